import math

import pytest
import torch

from backbone.classifier import CosineClassifier, first_rows


def test_logits_are_sigma_times_the_cosine_worked_by_hand():
    classifier = CosineClassifier(torch.tensor([[1.0, 0.0], [0.0, -2.0], [5.0, 5.0]]), torch.tensor(10.0))
    logits = classifier(torch.tensor([[3.0, 4.0], [-0.1, 0.0]]))  # cosines with (1,0), (0,-1), (1,1)/√2
    expected = [[6.0, -8.0, 70 / (5 * math.sqrt(2))], [-10.0, 0.0, -10 / math.sqrt(2)]]
    torch.testing.assert_close(logits, torch.tensor(expected))


def test_zero_rows_and_zero_features_give_zero_and_finite_gradients():
    classifier = CosineClassifier(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor(1.0))
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0]], requires_grad=True)
    logits = classifier(features)
    torch.testing.assert_close(logits, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    torch.nn.functional.cross_entropy(logits, torch.tensor([0, 0])).backward()
    assert torch.isfinite(classifier.weight.grad).all() and torch.isfinite(features.grad).all()
    # the quirk that the published numbers rest on: a zero row's first gradient is huge, so one batch sets its direction
    assert classifier.weight.grad[0].norm() > 1e6 > classifier.weight.grad[1].norm()


def test_growth_keeps_old_rows_and_sigma_and_leaves_the_old_classifier_alone():
    old = CosineClassifier(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor(7.0)).requires_grad_(False)
    grown = old.grown(torch.zeros(1, 2))
    assert grown.weight.tolist() == [[1, 2], [3, 4], [0, 0]] and grown.sigma.item() == 7
    assert grown.weight.requires_grad and grown.sigma.requires_grad
    with torch.no_grad():
        grown.weight.fill_(9)
        grown.sigma.fill_(9)
    assert old.weight.tolist() == [[1, 2], [3, 4]] and old.sigma.item() == 7


@pytest.mark.parametrize("dim", [4, 400])
def test_first_rows_are_uniform_within_one_over_root_dim(dim):
    rows = first_rows(2000, dim, torch.Generator().manual_seed(1))
    bound = 1 / math.sqrt(dim)
    assert rows.shape == (2000, dim)
    assert 0.99 * bound < rows.max() <= bound and -0.99 * bound > rows.min() >= -bound
    assert rows.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)  # that of a uniform distribution


def test_first_rows_depend_on_the_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (first_rows(3, 5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
