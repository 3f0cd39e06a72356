"""What ranks agree on: the largest number of the talk before, on all of them, however seldom they talk."""

from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.distributed as dist

from ldm_train import distributed
from ldm_train.distributed import Agreement, PacedAgreement
from tests.ranks import run_ranks


def _joined(rank, path):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)


def _each_call_returns_what_the_one_before_agreed_on(rank, path):
    _joined(rank, path)
    agreement, said = Agreement(), [[3, 0, 1, 0, 7, 0], [0, 5, 1, 0, 2, 0]]
    assert [agreement.exchange(value) for value in said[rank]] == [0, 3, 5, 1, 0, 7]
    assert agreement.now(rank) == 1
    dist.destroy_process_group()


def test_each_call_returns_what_the_one_before_agreed_on(tmp_path):
    run_ranks(_each_call_returns_what_the_one_before_agreed_on, tmp_path / "store")


def _what_is_out_of_date_is_not_heard(rank, path):
    _joined(rank, path)
    agreement = Agreement()
    agreement.forget()  # nothing was said yet
    agreement.exchange(4)
    assert agreement.exchange(3) == 4
    agreement.forget()
    assert [agreement.exchange(value) for value in (2, 0, 0)] == [0, 2, 0]
    dist.destroy_process_group()


def test_what_is_out_of_date_is_not_heard(tmp_path):
    run_ranks(_what_is_out_of_date_is_not_heard, tmp_path / "store")


def _a_word_is_heard_by_all_at_one_call(rank, path):
    """Rank 1 alone is slow for some calls, and alone has something to say from the sixtieth on."""
    _joined(rank, path)
    now = [0.0]
    distributed.time = SimpleNamespace(monotonic=lambda: now[0])
    agreement, answers = PacedAgreement(seconds=1.0, most_calls=8), []
    for call in range(100):
        now[0] += 10.0 if rank == 1 and 40 <= call < 50 else 0.001
        talks, value = agreement.next_call_talks(), 9 if rank == 1 and call >= 60 else 0
        answers.append(agreement.exchange(value) if talks else None)
    both = [None, None]
    dist.all_gather_object(both, answers)
    assert both[0] == both[1]
    talks = [call for call, answer in enumerate(answers) if answer is not None]
    gaps = [later - earlier for earlier, later in pairwise(talks)]
    assert gaps[:5] == [1, 2, 4, 8, 8]
    assert 1 in gaps[5:]  # one of them was slow
    agreement.talk_at_once()  # what follows takes long: nothing that was said before lets a call pass
    now[0] += 10.0
    assert [agreement.next_call_talks() and agreement.exchange(0) for _ in range(2)] == [9, 0]
    assert set(answers) == {None, 0, 9}
    assert 60 < answers.index(9) <= 60 + 2 * 8
    dist.destroy_process_group()


def test_a_word_is_heard_by_all_at_one_call(tmp_path):
    run_ranks(_a_word_is_heard_by_all_at_one_call, tmp_path / "store")


def _figures_are_those_of_the_joined_batch(rank, path):
    errors = torch.tensor([[1.0, 3.0], [5.0, 9.0]])
    figures = {"loss": errors[rank].mean().requires_grad_(), "steps": torch.tensor(2), "norm": torch.tensor(0.1).half()}
    assert not any(value.requires_grad for value in distributed.mean_figures(figures).values())  # alone: as they are
    _joined(rank, path)
    found = {name: float(value) for name, value in distributed.mean_figures(figures).items()}
    assert found == {"loss": float(errors.mean()), "steps": 2.0, "norm": float(figures["norm"])}
    dist.destroy_process_group()


def test_figures_are_those_of_the_joined_batch(tmp_path):
    run_ranks(_figures_are_those_of_the_joined_batch, tmp_path / "store")


def test_one_process_hears_what_it_says_at_each_call():
    agreement = PacedAgreement(seconds=1.0, most_calls=8)
    assert agreement.is_alone
    assert [agreement.exchange(value) for value in (0, 3, 0)] == [0, 3, 0]
    assert agreement.now(2) == 2
