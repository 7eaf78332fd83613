"""What an ordinary user's sandbox must do; run by a test as user nobody."""

from __future__ import annotations

import os

from wmtp.execution import check_sandbox, run_program

assert os.getuid() == 65534
assert check_sandbox().available, check_sandbox()
assert run_program("def f(): return 1", tests="assert f() == 1").passed
assert run_program("def f(): return 2", tests="assert f() == 1").status == "failed"
assert run_program("print(input())", cases=[("1", "1"), ("2", "2")]).passed
assert run_program("while True: pass", timeout_s=0.5).status == "timeout"
assert run_program("bytearray(2 << 30)").status == "memory"
assert run_program("import os; os.fork()").status == "error"
print("done")
