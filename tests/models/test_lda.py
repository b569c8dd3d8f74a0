import itertools

import pytest
import torch
from torch import Tensor

from models.streaming.lda import StreamingLDA, finite_float64, oas_covariance
from utils.errors import NumericError

DIM, ROWS = 5, 4


def streamed(batches: list[tuple[Tensor, Tensor]], rows: int = ROWS) -> StreamingLDA:
    lda = StreamingLDA(DIM)
    for features, labels in batches:
        lda.update(features, labels, rows)
    return lda


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """Correlated features far from the origin, so that a mean or a covariance done wrong shows."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % ROWS
    mixing = torch.randn(DIM, DIM, generator=generator)
    features = (
        torch.randn(40, DIM, generator=generator) @ mixing + 3 * torch.randn(ROWS, DIM, generator=generator)[labels]
    )
    return features + 20, labels


def test_statistics_worked_by_hand():
    lda = StreamingLDA(2)
    lda.update(torch.tensor([[0.0, 0.0], [2.0, 0.0], [5.0, 1.0], [5.0, 5.0]]), torch.tensor([0, 0, 1, 1]), 2)
    assert lda.means.tolist() == [[1, 0], [5, 3]]
    assert lda.scatter.tolist() == [[2, 0], [0, 8]]  # (−1)² + 1² and (−2)² + 2²


def test_before_the_first_task_there_is_no_row_to_score():
    lda = StreamingLDA(2)
    assert lda.means.shape == (0, 2) and lda.scores(torch.ones(3, 2)).shape == (3, 0)


def test_oas_worked_by_hand():
    # S = diag(1, 3), p = 2, n = 9: Tr(S) = 4, Tr(S²) = 10, so ρ = (0·10 + 16) / ((9 + 1 − 1)(10 − 16/2)) = 8/9.
    expected = torch.eye(2).double() * 8 / 9 * 2 + torch.tensor([1.0, 3.0]).double().diag() / 9
    torch.testing.assert_close(oas_covariance(torch.tensor([9.0, 27.0]).double().diag(), 9), expected)


# the formula gives ρ = ∞, ∞, 2 and 3/2
@pytest.mark.parametrize(
    "scatter",
    [torch.eye(3), torch.ones(1, 1), torch.tensor([4.0, 0.0]).diag(), torch.tensor([4.0, 0.0, 0.0]).diag()],
    ids=range(4),
)
def test_oas_never_shrinks_beyond_the_identity(scatter):
    covariance = oas_covariance(scatter.double(), 1)
    torch.testing.assert_close(covariance, scatter.trace().double() / len(scatter) * torch.eye(len(scatter)).double())


def test_degrees_of_freedom_are_images_less_the_rows_that_have_any():
    lda = StreamingLDA(2)
    lda.update(torch.tensor([[0.0, 0.0], [2.0, 1.0], [5.0, 1.0], [7.0, 5.0]]), torch.tensor([0, 0, 0, 2]), 3)
    torch.testing.assert_close(lda.covariance(), oas_covariance(lda.scatter, 4 - 2))


def test_two_different_images_of_one_row_are_spread_enough():
    lda = StreamingLDA(2)
    lda.update(torch.tensor([[0.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 0]), 1)
    assert lda.covariance().tolist() == [[4, 0], [0, 4]]  # the scatter is diag(8, 0), all of it shrunk


@pytest.mark.parametrize(("variance", "is_spread"), [(0.9e-12, False), (1.1e-12, True)])
def test_spread_is_a_variance_above_a_trillionth_of_the_means_square(variance, is_spread):
    lda = StreamingLDA(2)
    scatter = 10 * torch.diag(torch.tensor([variance, variance], dtype=torch.float64))  # of 11 images, in one row
    means = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    lda.load_state_dict({"images": torch.tensor([11.0], dtype=torch.float64), "means": means, "scatter": scatter})
    assert (lda.covariance()[0, 0].item() == 1.0) is not is_spread


def test_scores_are_log_likelihood_ratios(data):
    lda = streamed([data])
    within = data[0].double() - lda.means[data[1]]
    covariance = oas_covariance(within.T @ within, 40 - ROWS)
    probes = data[0][:7] + 0.5
    gaussians = [torch.distributions.MultivariateNormal(mean, covariance) for mean in lda.means]
    expected = torch.stack([g.log_prob(probes.double()) for g in gaussians], dim=1)
    scores = lda.scores(probes).double()
    torch.testing.assert_close(scores - scores[:, :1], expected - expected[:, :1], rtol=1e-4, atol=1e-3)


def test_one_batch_or_one_image_at_a_time_is_the_same(data):
    features, labels = data
    whole, single = streamed([data]), streamed([(features[i : i + 1], labels[i : i + 1]) for i in range(40)])
    torch.testing.assert_close(single.means, whole.means, rtol=1e-12, atol=0)
    torch.testing.assert_close(single.scatter, whole.scatter, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(single.scores(features), whole.scores(features))


def test_order_of_tasks_is_irrelevant(data):
    features, labels = data
    tasks = [(features[labels == row], labels[labels == row]) for row in range(ROWS)]
    first, *others = [streamed(list(order)) for order in itertools.permutations(tasks)]
    for other in others:
        torch.testing.assert_close(other.means, first.means, rtol=1e-12, atol=0)
        torch.testing.assert_close(other.scatter, first.scatter, rtol=1e-12, atol=1e-12)


def test_far_from_the_origin_nothing_cancels():
    features = torch.tensor([[1e8], [1e8 + 8], [1e8 + 16]])  # exact in float32
    lda = StreamingLDA(1)
    for feature in features:
        lda.update(feature[None], torch.tensor([0]), 1)
    assert lda.scatter.item() == 128  # 8² + 0 + 8²; sums of squares minus means of 1e16 would have lost it


def test_covariance_decides_where_means_alone_are_wrong():
    """Spread along x only: a point nearer to mean 1 in x, but at mean 0's height, is of class 0."""
    x = torch.linspace(-10, 10, 21)
    lda = StreamingLDA(2)
    lda.update(torch.stack([x, 0.1 * x.cos()], dim=1), torch.zeros(21, dtype=torch.long), 1)
    lda.update(torch.stack([x + 4, 1 + 0.1 * x.cos()], dim=1), torch.ones(21, dtype=torch.long), 2)
    probe = torch.tensor([[4.0, 0.2]])
    assert torch.cdist(probe.double(), lda.means).argmin() == 1
    assert lda.scores(probe).argmax() == 0


def test_one_image_in_each_class_is_the_nearest_mean():
    features = torch.tensor([[0.0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 3, 0, 0, 0]])
    lda = streamed([(features[i : i + 1], torch.tensor([i])) for i in range(3)], rows=3)
    probes = torch.tensor([[0.4, 0, 0, 0, 0], [0.7, 1, 0, 0, 0], [0, 2, 0, 0, 0]])
    assert lda.scores(probes).argmax(dim=1).tolist() == torch.cdist(probes, features).argmin(dim=1).tolist()


@pytest.mark.parametrize(
    "features",
    [
        torch.zeros(6, DIM),
        torch.full((6, DIM), 0.1),  # equal images: rounding must not pass for spread
        torch.arange(6.0)[:, None].repeat(1, DIM),  # one direction only
        torch.eye(6)[:, :DIM],
        1e-20 * torch.eye(6)[:, :DIM],
    ],
)
def test_no_nan(features):
    lda = streamed([(features[:3], torch.tensor([0, 0, 0])), (features[3:], torch.tensor([1, 1, 2]))], rows=3)
    assert lda.scores(torch.cat([features, torch.zeros(1, DIM), torch.ones(1, DIM)])).isfinite().all()


def test_scale_of_the_features_is_irrelevant(data):
    features, labels = data
    probes = features.flip(0) + 0.3
    small = streamed([(features * 2**-10, labels)]).scores(probes * 2**-10)
    torch.testing.assert_close(small, streamed([data]).scores(probes))


def test_rows_without_images_cannot_win():
    lda = streamed([(torch.ones(3, DIM), torch.tensor([1, 1, 3]))])
    scores = lda.scores(-torch.ones(2, DIM))
    assert (scores[:, [0, 2]] == -torch.inf).all() and scores[:, [1, 3]].isfinite().all()
    assert StreamingLDA(DIM).scores(torch.ones(2, DIM)).shape == (2, 0)
    assert lda.scores(torch.ones(0, DIM)).shape == (0, ROWS)


def test_later_rows_join_an_earlier_class(data):
    lda = streamed([(data[0][:10], data[1][:10])])
    lda.update(data[0][10:], data[1][10:], ROWS)
    assert lda.images.tolist() == [10] * ROWS


def test_state_round_trip_is_bit_exact_and_goes_on_alone(data):
    features, labels = data
    original = streamed([(features[:20], labels[:20])])
    copy = StreamingLDA(DIM)
    copy.load_state_dict(original.state_dict())
    assert torch.equal(copy.scores(features), original.scores(features))
    before = original.scores(features)
    copy.update(features[20:], labels[20:], ROWS)
    assert torch.equal(original.scores(features), before)
    original.update(features[20:], labels[20:], ROWS)
    assert torch.equal(original.scores(features), copy.scores(features))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_feature_that_is_not_finite_is_refused(bad):
    features = torch.ones(4, DIM)
    features[2, 1] = bad
    lda = StreamingLDA(DIM)
    with pytest.raises(NumericError, match="1 of 4 training features are NaN or infinite, the first at 2"):
        lda.update(features, torch.zeros(4, dtype=torch.long), 1)
    assert len(lda.images) == 0
    assert finite_float64(torch.ones(2, 2), torch.device("cpu")).dtype == torch.float64
