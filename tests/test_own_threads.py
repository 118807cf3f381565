"""Parts of a solve on threads of their own: the caller's settings hold inside and are as before afterwards."""

import pytest
import torch

from zeroskip.prune.threads import own_threads


@pytest.mark.parametrize("count", [1, 2, 3])
def test_order_threads_and_modes(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with torch.inference_mode():
            x = torch.ones(3, requires_grad=False)
            with own_threads() as run:
                seen = list(run(lambda i: (i, torch.get_num_threads(), x.mul_(1).is_inference()), range(7)))
        assert seen == [(i, 1, True) for i in range(7)]
        w = torch.ones(3, requires_grad=True)
        with own_threads() as run:
            assert not any(run(lambda i: (w * i).requires_grad, range(4)))
        assert torch.get_num_threads() == count
        with own_threads() as run, pytest.raises(ZeroDivisionError):
            list(run(lambda i: 1 // i, range(3)))
        assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)
