"""Tree-structured Parzen estimator over candidates by layer, by joint loss; needs `pip install "moeify[search]"`.

Proposals beyond the budget are repaired and judged by what the repair gave. Bergstra et al. 2011,
https://papers.nips.cc/paper/4443-algorithms-for-hyper-parameter-optimization
"""

import numpy as np

from moeify.errors import UsageError
from moeify.strategies import Choice, Problem, greedy
from moeify.strategies._repair import repair
from moeify.strategies._trials import Trials


def choose(problem: Problem) -> Choice:
    """See the package for the contract.

    Raises:
        UsageError: optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UsageError(
            "the strategy tpe needs optuna, which is not installed", 'pip install "moeify[search]"'
        ) from error

    trials, first = Trials(problem), greedy.choose(problem)
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        str(layer): optuna.distributions.CategoricalDistribution(np.flatnonzero(row).tolist())
        for layer, row in enumerate(problem.exists)
    }
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=problem.seed))
        study.enqueue_trial({str(layer): candidate for layer, candidate in enumerate(first)})
        while trials.open:
            trial = study.ask(distributions)
            proposal = tuple(trial.params[str(layer)] for layer in range(len(first)))
            study.tell(trial, trials.measure(repair(problem, proposal)))
    finally:
        optuna.logging.set_verbosity(verbosity)
    return trials.best
