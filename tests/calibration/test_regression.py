"""One factorisation gives the solution of every damped least-squares problem on the same tokens."""

import torch

from moeify.calibration.regression import PENALTY, cholesky, rank, regress


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rank_solves_the_normal_equations() -> None:
    inputs_TD, target_TR = noise(300, 6), noise(300, 4, seed=1)
    x, y = inputs_TD.double(), target_TR.double()
    gram = x.T @ x
    damped = gram + PENALTY * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.solve(damped, x.T @ (y - y.mean(dim=1, keepdim=True))).T
    factor_DD = cholesky(inputs_TD)
    torch.testing.assert_close(rank(factor_DD, inputs_TD, target_TR).double(), expected, rtol=1e-4, atol=1e-5)
    assert rank(factor_DD, inputs_TD, target_TR).dtype == inputs_TD.dtype
    torch.testing.assert_close(factor_DD @ factor_DD.T, damped, rtol=1e-5, atol=1e-4)


def test_what_all_experts_have_in_common_is_left_out() -> None:
    inputs_TD, target_TR = noise(300, 6), noise(300, 4, seed=1)
    factor_DD = cholesky(inputs_TD)
    moved_TR = target_TR + 50 * noise(300, 1, seed=2)
    first, second = (rank(factor_DD, inputs_TD, target) for target in (target_TR, moved_TR))
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-4)


def test_inputs_of_zero_and_fewer_tokens_than_features_are_possible() -> None:
    for inputs_TD in (torch.zeros(10, 6), noise(3, 6)):
        rows_RD = rank(cholesky(inputs_TD), inputs_TD, noise(len(inputs_TD), 4, seed=1))
        assert rows_RD.isfinite().all()


def test_the_level_of_a_target_is_regressed_with_an_intercept() -> None:
    inputs_TD, slope_RD = noise(400, 6), noise(4, 6, seed=1)
    level_R = torch.tensor([10.0, 20.0, 30.0, 40.0])
    target_TR = inputs_TD @ slope_RD.T + level_R
    rows_RD, intercept_R = regress(inputs_TD, target_TR)
    fitted_TR = inputs_TD @ rows_RD.T + intercept_R
    # The penalty shrinks slopes by a hundredth, and no level.
    torch.testing.assert_close(rows_RD, slope_RD, rtol=0.03, atol=0.01)
    torch.testing.assert_close(fitted_TR.mean(0), target_TR.mean(0), rtol=1e-5, atol=1e-5)
    moved_RD, moved_R = regress(inputs_TD, target_TR + 7)
    torch.testing.assert_close(moved_RD, rows_RD, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(moved_R, intercept_R + 7)
