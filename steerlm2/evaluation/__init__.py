"""How good a model is: agreement with labels, exact KL where it can be known, the report.

agreement  scores against labels, rewards against preferences
exact_kl   distance to the grammar's P(y|a,x), by scoring every response there is
examples   a few requests, with the answer of each model
report     steering.html of an evaluation, report.html of a pipeline
charts     the lines on them
"""

from steerlm2.evaluation.exact_kl import grammar_metrics

__all__ = ["grammar_metrics"]
