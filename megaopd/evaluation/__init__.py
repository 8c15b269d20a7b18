"""How good a model's answers are: samples, scores, estimates with their intervals, and a page.

`scoring` generates and scores, `estimates` makes figures of the scores, `voting` says what a
response's answer is, `journal` keeps what is done, `questions` asks in several ways, `page` shows
it; `cli` is the command line. Training uses the same `evaluate`.
"""

from megaopd.evaluation.scoring import (
    EvalRecord,
    EvalResult,
    eval_metrics,
    evaluate,
    nothing_sampled,
)

__all__ = ["EvalRecord", "EvalResult", "eval_metrics", "evaluate", "nothing_sampled"]
