"""The network of SVAR's authors is a plain one, trained as they say."""

import pytest
import torch

from vlm_steer.detection import Training, choose_training, fit_logistic, fit_network
from vlm_steer.detection.network import BATCH, first_weights
from vlm_steer.errors import DataError


def crossed(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The label is whether two features have the same sign, which no line tells."""
    x = torch.randn(n, 2, dtype=torch.float64)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def test_it_learns_what_logistic_regression_cannot():
    metrics = pytest.importorskip("sklearn.metrics")
    networks = pytest.importorskip("sklearn.neural_network")
    x, y = crossed(256)
    new, truth = crossed(400)
    network = fit_network(x, y, Training(hidden=32, rate=1e-2, epochs=20))
    theirs = networks.MLPClassifier(
        (32,), batch_size=BATCH, learning_rate_init=1e-2, alpha=0, max_iter=20, random_state=0
    )
    with pytest.warns(match="Maximum iterations"):
        theirs.fit(x.numpy(), y.numpy())
    mine = metrics.roc_auc_score(truth, network.logits(new))
    expected = metrics.roc_auc_score(truth, theirs.predict_proba(new.numpy())[:, 1])
    assert mine > 0.97
    assert mine == pytest.approx(expected, abs=0.02)
    assert metrics.roc_auc_score(truth, fit_logistic(x, y).logits(new)) < 0.65


@pytest.mark.parametrize("standardise", [False, True])
def test_training_is_adam_on_the_cross_entropy_of_two_outputs(standardise):
    x, y = crossed(70)
    training = Training(hidden=5, rate=3e-3, epochs=3)
    found = fit_network(x, y, training, standardise=standardise, is_balanced=False, seed=4)
    generator = torch.Generator().manual_seed(4)
    parameters = first_weights(2, 5, generator)
    layers = torch.nn.Sequential(
        torch.nn.Linear(2, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2)
    ).double()
    with torch.no_grad():
        for own, drawn in zip(layers.parameters(), parameters, strict=True):
            own.copy_(drawn)
    optimizer = torch.optim.Adam(layers.parameters(), lr=3e-3)
    inputs = (x - x.mean(0)) / x.std(0, correction=0) if standardise else x
    for _ in range(3):
        for batch in torch.randperm(70, generator=generator).split(BATCH):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layers(inputs[batch]), y[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        outputs = layers(inputs)
    torch.testing.assert_close(found.logits(x), outputs[:, 1] - outputs[:, 0])


def test_the_seed_alone_decides():
    x, y = crossed(60)
    state = torch.random.get_rng_state()
    first, again, other = (fit_network(x, y, Training(8, 1e-3, 2), seed=s) for s in (1, 1, 2))
    assert first.logits(x).equal(again.logits(x))
    assert not first.logits(x).equal(other.logits(x))
    assert torch.random.get_rng_state().equal(state)


def test_how_long_to_train_is_chosen_on_images_left_out():
    x, y = crossed(60)
    groups = [f"image {i // 2}" for i in range(60)]
    grid = {"rates": (1e-3, 1e-2), "epochs": (2, 20)}
    assert choose_training(x, y, groups, **grid) == Training(rate=1e-2, epochs=20)
    # What cannot be learnt is best learnt little.
    noise = torch.randn(60, 30)
    assert choose_training(noise, y, groups, **grid) == Training(rate=1e-3, epochs=2)
    with pytest.raises(DataError, match="cannot be told apart"):
        choose_training(x[:20], y[:20], groups[:20])
