"""What a run is made of: loaders, tokenizers, data, scorers, pretrainers, trainers, optimizers, evaluators."""
