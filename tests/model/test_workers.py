import threading

import pytest
import torch

from recbole_mm.model.workers import MOST_WORKERS, n_workers, share_out

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_part_is_worked_on_once_and_by_the_worker_of_its_turn(two_threads, workers):
    done, lock = [], threading.Lock()

    def work(number, worker):
        assert not torch.is_grad_enabled()
        with lock:
            done.append((number, worker))

    share_out(work, 7, n_workers=workers)
    assert sorted(done) == [(number, number % workers) for number in range(7)]
    assert torch.get_num_threads() == 2 and torch.is_grad_enabled()


def test_an_error_of_a_part_is_raised_and_the_threads_are_as_before(two_threads):
    with pytest.raises(ZeroDivisionError):
        share_out(lambda number, worker: 1 / (number - 3), 5, n_workers=2)
    assert torch.get_num_threads() == 2


def test_workers_are_no_more_than_threads_parts_or_the_most(two_threads):
    assert [n_workers(CPU, parts) for parts in (0, 1, 2, 9)] == [1, 1, 2, 2]
    torch.set_num_threads(MOST_WORKERS + 3)
    assert n_workers(CPU, 100) == MOST_WORKERS
    assert n_workers(torch.device("cuda"), 100) == 1
