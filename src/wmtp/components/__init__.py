"""The parts of a run: loaders, tokenizers, data, scorers, pretrainers, trainers, optimizers, evaluators."""
