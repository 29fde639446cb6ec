"""What goes wrong on one rank is raised on all, and nobody waits."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support.clean_server import processes

from mmf_fast.data.formats import DataError
from mmf_fast.distributed import agree, gather, rank_and_count

PROBLEMS = {
    "disk": OSError(28, "No space left on device", "a.pt"),
    "data": DataError("a.npz: damaged; fetch it again"),
}


def test_a_process_alone_is_rank_0_of_1() -> None:
    assert rank_and_count() == (0, 1)
    assert gather("x") == ["x"]
    assert agree(lambda: 3) == 3
    problem = PROBLEMS["data"]
    with pytest.raises(DataError) as caught:
        agree(lambda: fail(problem))
    assert caught.value is problem


def fail(problem: Exception) -> None:
    raise problem


@pytest.mark.parametrize("name", PROBLEMS)
def test_both_ranks_raise_what_went_wrong_on_the_second(name: str, tmp_path: Path) -> None:
    problem = PROBLEMS[name]
    for kind, text in in_two(tmp_path, name):
        assert kind is type(problem) and text == str(problem)


def test_both_ranks_have_their_own_result_and_know_the_other(tmp_path: Path) -> None:
    assert in_two(tmp_path, "") == [(0, [0, 10]), (10, [0, 10])]


def in_two(folder: Path, name: str) -> list[Any]:
    answers = processes.SimpleQueue()
    ranks = [processes.Process(target=one, args=(rank, folder, name, answers.put), daemon=True) for rank in range(2)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(60)
    assert [each.exitcode for each in ranks] == [0, 0]
    return [answer for _, answer in sorted((answers.get() for _ in ranks), key=lambda pair: pair[0])]


def one(rank: int, folder: Path, name: str, answer: Callable[[tuple[int, Any]], None]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    try:
        if name:
            agree(lambda: fail(PROBLEMS[name]) if rank else None)
        answer((rank, (agree(lambda: 10 * rank), gather(10 * rank))))
    except (OSError, ValueError) as error:
        answer((rank, (type(error), str(error))))
    dist.destroy_process_group()
