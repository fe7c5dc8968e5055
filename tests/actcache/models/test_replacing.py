"""Activations replaced at several hooks of one block, in any order, against HookedTransformer's own hooks."""

from itertools import permutations

import pytest
import torch
from support.saelens_models import close, hooked, token_ids, transformers_module

from actcache.errors import ModelError
from actcache.models.live import live_model
from actcache.models.replacing import parts_of, same_shape, unless

pytest.importorskip("sae_lens")
pytestmark = pytest.mark.filterwarnings("ignore:.*HookedTransformer.* is deprecated:DeprecationWarning")
MID, MLP_OUT, POST = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"
CHANGES = [(MID, lambda x: 0.5 * x), (MLP_OUT, lambda x: x + 1.0), (POST, lambda x: x.roll(1, dims=-1))]


@pytest.mark.parametrize("changes", [*permutations(CHANGES), [CHANGES[0], CHANGES[0]]], ids=lambda c: [n for n, _ in c])
def test_the_order_in_which_they_are_named_does_not_count(changes):
    """Each changes the stream where it is; what comes later in the pass sees that."""
    fwd_hooks = [(name, lambda x, hook, fn=fn: fn(x)) for name, fn in changes]
    with torch.no_grad():
        expected = hooked().run_with_hooks(token_ids(), fwd_hooks=fwd_hooks)
    for module in (transformers_module(), hooked()):
        model = live_model(module)
        with model.replacing(changes):
            assert close(expected, model.logits(token_ids()))


def test_an_activation_that_is_only_looked_at_stays_as_it_is():
    model, seen = live_model(transformers_module()), []
    with model.replacing([(name, seen.append) for name in (MID, MLP_OUT, POST)]):
        logits = model.logits(token_ids())
    assert torch.equal(logits, model.logits(token_ids()))
    assert [x.shape for x in seen] == [(*token_ids().shape, model.d_model)] * 3
    assert torch.equal(seen[0] + seen[1], seen[2])


def test_a_block_that_does_not_add_is_refused():
    (at_mid,), (at_mlp_out,), (at_post,) = (
        [fn for _, fn in pairs] for pairs in (lambda p: (p.here, p.after, p.before))(parts_of(MID, lambda x: 2 * x))
    )
    at_mid(torch.ones(2)), at_mlp_out(torch.ones(2))
    assert torch.equal(at_post(torch.full((2,), 2.0)), torch.full((2,), 3.0)), "the stream passed by"
    assert at_post(torch.full((2,), 3.0)) is None, "the stream was replaced"
    with pytest.raises(ModelError, match="needs a block whose output is hook_resid_mid"):
        at_post(torch.zeros(2))


def test_the_shape_is_kept_and_a_function_can_be_left_out():
    with pytest.raises(ValueError, match=r"must keep the shape \(2,\), got \(1,\)"):
        same_shape(lambda x: x[:1])(torch.ones(2))
    skipped = [True]
    function = unless(lambda: skipped[0], lambda x: 2 * x)
    assert function(torch.ones(1)) is None
    skipped[0] = False
    assert function(torch.ones(1)) == 2
