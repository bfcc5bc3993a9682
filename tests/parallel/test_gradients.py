import torch
from torch import nn

from relic.parallel import average_gradients, clip_gradients, gradients, primed


def parameters(*gradients: torch.Tensor | None) -> list[nn.Parameter]:
    made = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros(2) if gradient is None else torch.zeros_like(gradient))
        parameter.grad = None if gradient is None else gradient.clone()
        made.append(parameter)
    return made


def test_the_norm_is_of_all_gradients_together_and_is_clipped_only_if_it_is_too_large():
    threes, four = torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])
    for limit, factor in ((None, 1.0), (10.0, 1.0), (1.0, 0.2)):
        given = parameters(threes, None, four)
        assert float(clip_gradients(iter(given), limit=limit)) == 5.0
        torch.testing.assert_close(given[0].grad, factor * threes)
        torch.testing.assert_close(given[2].grad, factor * four)
        assert given[1].grad is None


def test_a_single_process_keeps_its_gradients():
    given = parameters(torch.ones(3))
    average_gradients(given)
    assert torch.equal(given[0].grad, torch.ones(3))


def test_gradients_are_sent_in_buckets_of_one_dtype_and_bounded_size(monkeypatch):
    monkeypatch.setattr(gradients, "BUCKET", 12)  # bytes
    sizes = [torch.zeros(n, dtype=d) for n, d in ((1, torch.float32), (2, torch.float32), (1, torch.float32),
             (1, torch.float64), (9, torch.float64), (1, torch.float32))]  # fmt: skip
    buckets = [[g.numel() for g in bucket] for bucket in gradients._buckets(sizes)]
    assert buckets == [[1, 2], [1], [1], [9], [1]]


def test_a_primed_optimiser_has_state_and_goes_on_as_a_fresh_one():
    ends = []
    for prime in (False, True):
        weight = nn.Parameter(torch.linspace(-1, 1, 5))
        optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.0, 0.999))
        if prime:
            assert primed(optimizer) is optimizer
            assert torch.equal(weight.detach(), torch.linspace(-1, 1, 5)) and weight.grad is None
            assert set(optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}
            assert not any(value.any() for value in optimizer.state[weight].values())
            assert optimizer.param_groups[0]["lr"] == 0.1
        for step in range(3):
            weight.grad = torch.arange(5.0) - step
            optimizer.step()
        ends.append(weight.detach())
    assert torch.equal(*ends)
