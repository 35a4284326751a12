"""Many models are checked by two processes, with the results of one."""

import os
import signal
from pathlib import Path

import pytest

from build_tasks.doit_plugin.stat_signatures import WORTH_A_PROCESS, check_all

pytestmark = [
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),  # pytest has threads, and doit has none yet
]


@pytest.mark.parametrize(("count", "processes"), [(WORTH_A_PROCESS - 1, 1), (WORTH_A_PROCESS, 2), (501, 2)])
def test_the_results_are_those_of_one_process(tmp_path: Path, count: int, processes: int) -> None:
    def check(number: int) -> bool:
        with open(tmp_path / str(os.getpid()), "a", encoding="utf-8") as checked:
            checked.write(f"{number}\n")
        return number % 3 == 0

    assert check_all(check, range(count)) == [number % 3 == 0 for number in range(count)]
    checked = [path.read_text(encoding="utf-8").split() for path in tmp_path.iterdir()]
    assert len(checked) == processes
    assert sorted(int(number) for numbers in checked for number in numbers) == list(range(count))


@pytest.mark.parametrize("end", [lambda: os.kill(os.getpid(), signal.SIGKILL), lambda: 1 / 0])
def test_what_a_child_did_not_check_counts_as_changed(tmp_path: Path, end: object) -> None:
    parent = os.getpid()

    def check(number: int) -> bool:
        if os.getpid() != parent and number == 300:
            (tmp_path / "child").write_text(str(os.getpid()), encoding="utf-8")
            assert callable(end)
            end()
        return True

    results = check_all(check, range(400))
    assert results[:200] == [True] * 200
    assert not any(results[300:])
    with pytest.raises(ChildProcessError):  # the child has been waited for
        os.waitpid(int((tmp_path / "child").read_text(encoding="utf-8")), os.WNOHANG)
