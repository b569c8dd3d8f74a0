import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.streaming.lda import StreamingLDA
from models.streaming.ridge import RandomRidge
from models.streaming.ridge_pair import TEMPERATURES, RidgePair, temperature_losses
from models.streaming.whitening import Whitening, make_whitening
from utils.errors import NumericError

DIM, ROWS, WIDTH = 6, 4, 60


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(48) % ROWS
    return torch.randn(48, DIM, generator=generator) + 2 * torch.randn(ROWS, DIM, generator=generator)[labels], labels


def parts(data: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor, int]]:
    """Two tasks of two rows."""
    return [(*(v[torch.isin(data[1], torch.tensor(rows))] for v in data), rows[1] + 1) for rows in ((0, 1), (2, 3))]


def fitted(tasks: list[tuple[Tensor, Tensor, int]], width: int = WIDTH) -> RidgePair:
    pair = RidgePair(DIM, width, 0)
    for task in tasks:
        pair.update(*task)
    return pair


# -- whitening --------------------------------------------------------------------------------------------------------


def test_whitening_worked_by_hand():
    """Two classes at (±10, 0) that spread by ±3 and ±1 along the axes: the covariance is diag(12, 4/3)."""
    spread = torch.tensor([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]])
    centres = torch.tensor([[10.0, 0.0], [-10.0, 4.0]])
    statistics = StreamingLDA(2)
    statistics.update(torch.cat([spread + c for c in centres]), torch.tensor([0, 1]).repeat_interleave(4), 2)
    covariance = statistics.covariance()
    whitening = make_whitening(statistics)
    assert whitening.mean.tolist() == [0.0, 2.0]  # the mean of the two means
    ordered, _ = covariance.diagonal().sort()  # eigenvalues come in rising order
    torch.testing.assert_close(whitening.scales.double(), ordered.rsqrt(), rtol=1e-6, atol=0)
    matrix = (whitening.directions * whitening.scales).double()
    torch.testing.assert_close(matrix.T @ covariance @ matrix, torch.eye(2).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        whitening(torch.tensor([[1.0, 2.0]])).double(), torch.tensor([[1.0, 0.0]]).double() @ matrix
    )


def test_a_row_without_images_moves_no_centre():
    statistics = StreamingLDA(2)
    statistics.update(torch.tensor([[1.0, 2.0], [3.0, 2.0], [6.0, 8.0]]), torch.tensor([0, 0, 2]), 3)
    assert make_whitening(statistics).mean.tolist() == [4, 5]  # between (2, 2) and (6, 8)


def test_features_inside_a_class_become_white():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(DIM, DIM, generator=generator)
    labels = torch.arange(20_000) % 2
    features = torch.randn(20_000, DIM, generator=generator) @ mixing + 50.0 * labels[:, None]
    statistics = StreamingLDA(DIM)
    statistics.update(features, labels, 2)
    white = make_whitening(statistics)(features)
    torch.testing.assert_close(white[labels == 0].T.cov(), torch.eye(DIM), rtol=0, atol=0.05)
    torch.testing.assert_close(white.mean(dim=0), torch.zeros(DIM), rtol=0, atol=0.01)


@pytest.mark.parametrize("features", [torch.zeros(4, DIM), torch.full((4, DIM), 0.1)])
def test_without_spread_the_whitening_only_centres(features):
    statistics = StreamingLDA(DIM)
    statistics.update(features, torch.tensor([0, 0, 1, 1]), 2)
    torch.testing.assert_close(make_whitening(statistics)(features), torch.zeros(4, DIM))


# -- temperatures -----------------------------------------------------------------------------------------------------


def test_temperatures_are_powers_of_the_square_root_of_two():
    assert TEMPERATURES[:4] == (1.0, pytest.approx(2**0.5), 2.0, pytest.approx(2**1.5)) and TEMPERATURES[-1] == 256


def test_the_best_temperature_worked_by_hand():
    """Three of four images are right and one wrong, by the same margin of ½: the best p(right) is ¾ = 1 / (1 + e^-τ/2).

    So τ = 2 ln 3 = 2.197; its nearest candidate below is 2, which is better than 2√2.
    """
    scores = torch.tensor([[0.5, 0.0]]).double().repeat(4, 1)
    losses = temperature_losses(scores, torch.tensor([0, 0, 0, 1]))
    assert TEMPERATURES[int(losses.argmin())] == 2.0
    p = 1 / (1 + torch.tensor(-1.0).exp())
    assert losses[2].item() == pytest.approx(-(3 * p.log() + (1 - p).log()).item())


def test_temperature_is_chosen_on_images_that_the_regression_did_not_see(data):
    """Each image is scored by a regression on all others, fitted here one by one by the textbook formula."""
    first, (features, labels, _) = parts(data)
    pair = fitted([first])
    before = pair.losses
    pair.update(features, labels, ROWS)
    inputs = {"plain": data[0], "whitened": F.normalize(pair.whitening(data[0]), dim=1)}
    for number, (name, seen) in enumerate(inputs.items()):
        ridge = pair.ridges[name]
        hidden, targets = (seen @ ridge.projection).relu().double(), F.one_hot(data[1], ROWS).double()
        scores = []
        for image in torch.isin(data[1], torch.tensor([2, 3])).nonzero().flatten():
            others = torch.arange(48) != image
            gram = hidden[others].T @ hidden[others] + ridge.ridge * torch.eye(WIDTH)
            scores.append(hidden[image] @ torch.linalg.solve(gram, hidden[others].T @ targets[others]))
        expected = before[number] + temperature_losses(torch.stack(scores), labels)
        torch.testing.assert_close(pair.losses[number], expected, rtol=1e-5, atol=1e-6)


def test_each_regression_has_the_temperature_of_its_smallest_loss():
    pair = RidgePair(DIM, 20, 0)
    pair.losses = (torch.arange(len(TEMPERATURES)) - torch.tensor([[2], [8]])).abs().double()
    assert pair.temperatures == [2.0, 16.0]


def test_losses_of_all_tasks_are_added(data):
    first, second = parts(data)
    assert not fitted([]).losses.any()
    alone = fitted([first]).losses
    both = fitted([first, second]).losses
    assert (both > alone).all()


# -- the pair ---------------------------------------------------------------------------------------------------------


def test_scores_are_the_mean_of_two_calibrated_log_probabilities(data):
    pair = fitted(parts(data))
    plain, whitened = pair.ridges.values()
    seen = F.normalize((data[0] - pair.whitening.mean) @ (pair.whitening.directions * pair.whitening.scales), dim=1)
    tau = pair.temperatures
    expected = 0.5 * (
        (tau[0] * plain.scores(data[0])).log_softmax(dim=1) + (tau[1] * whitened.scores(seen)).log_softmax(dim=1)
    )
    torch.testing.assert_close(pair.scores(data[0]), expected)
    assert not torch.equal(plain.projection, whitened.projection)


def test_the_whitening_of_the_first_task_stays(data):
    first, second = parts(data)
    pair = fitted([first])
    kept = Whitening(*(part.clone() for part in pair.whitening))
    statistics = StreamingLDA(DIM)
    statistics.update(*first)
    torch.testing.assert_close(kept.scales, make_whitening(statistics).scales)
    pair.update(*second)
    assert all(torch.equal(*both) for both in zip(kept, pair.whitening, strict=True))


@pytest.mark.parametrize("width", [400, 20])
def test_state_round_trip_is_bit_exact_and_goes_on_alone(data, width):
    first, second = parts(data)
    original, copy = fitted([first], width), RidgePair(DIM, width, 0)
    copy.load_state_dict(original.state_dict())
    assert torch.equal(copy.scores(data[0]), original.scores(data[0]))
    for pair in (original, copy):
        pair.update(*second)
    assert original.state_dict().keys() == copy.state_dict().keys()
    assert all(torch.equal(value, copy.state_dict()[name]) for name, value in original.state_dict().items())


def test_prediction_changes_nothing(data):
    pair, untouched = fitted(parts(data)), fitted(parts(data))
    pair.scores(100 * torch.randn(500, DIM))
    assert all(torch.equal(value, untouched.state_dict()[name]) for name, value in pair.state_dict().items())


def test_a_sample_is_answered_by_itself(data):
    pair = fitted(parts(data))
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    together = pair.scores(data[0])
    torch.testing.assert_close(pair.scores(data[0][order]), together[order])
    torch.testing.assert_close(torch.cat([pair.scores(one) for one in data[0].split(1)]), together)


def test_rows_without_images_cannot_win():
    pair = RidgePair(DIM, 20, 0)
    pair.update(torch.eye(DIM)[:5], torch.tensor([1, 1, 3, 3, 1]), ROWS)
    scores = pair.scores(-torch.ones(2, DIM))
    assert (scores[:, [0, 2]] == -torch.inf).all() and scores[:, [1, 3]].isfinite().all()


def test_a_feature_that_is_not_finite_is_refused():
    pair = RidgePair(DIM, 40, 0)
    features = torch.ones(4, DIM)
    features[3] = torch.nan
    with pytest.raises(NumericError, match="the first at 3"):
        pair.update(features, torch.zeros(4, dtype=torch.long), 1)


def test_leaving_one_out_learns_the_same(data):
    plain, judged = RandomRidge(DIM, 120, 0), RandomRidge(DIM, 120, 0)
    for task in parts(data):
        plain.update(*task)
        judged.update_leaving_one_out(*task)
    assert all(torch.equal(value, judged.state_dict()[name]) for name, value in plain.state_dict().items())
