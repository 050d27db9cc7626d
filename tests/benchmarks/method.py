"""Bias, variance and direction of SteerLM 2.0's gradient in the world whose answers can be listed.

    python tests/benchmarks/method.py --proposal steerlm2_outputs/quickstart/acsft \
        --trained steerlm2_outputs/quickstart/steerlm2_iter1 --json FILE --plot FILE.png

The exact gradient is that of KL(P || Q_theta) for a pair of question and label, with P(y|a,x) the
world's own, with respect to the model's parameters. The loss (steerlm2.losses.SteerLM2Loss)
estimates it from n answers drawn from Q', many times (--draws), for each share of the baseline, n
of 4 and 16, and three ways to treat answers that were drawn twice: kept (iid), dropped (distinct),
and dropped with the correction (samples_per_prompt). The model is Q' itself at the start, and then
each of those that are given as trained from it. The seed of the draws is n.

Of each: |E g - exact|^2 and E |g - E g|^2 as shares of |exact|^2, and the cosine of E g with the
exact gradient; medians over --pairs pairs. Where P(a|x,y) P(y|x) is a model's it has errors of its
own, which aren't in here. Strings that are no answers of the world count as one, whose gradient
follows from those of all others, as sum_y Q(y) grad log Q(y) = 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from omegaconf import OmegaConf
from torch import Tensor

from steerlm2.config.loader import instantiate
from steerlm2.data.grammar import LABELS, SYSTEM_PROMPT, Pair, answers, grammar_pairs
from steerlm2.data.packing import Group, pack
from steerlm2.data.records import USER, Turn
from steerlm2.data.templates import encode_prompt, encode_response
from steerlm2.distributed.world import World
from steerlm2.inference.answers import load_whole_decoder
from steerlm2.losses import RARE, SteerLM2Loss, target_weights
from steerlm2.pipeline.plan import config_file
from steerlm2.training.forward import response_logps

# Dimension letters: Y strings: the world's answers and, last, all others. R draws of a group,
# n answers of a group, N answers of all groups, W parameters.

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
SIZES = (4, 16)
Drawing = Literal["iid", "distinct", "corrected"]
DRAWINGS: tuple[Drawing, ...] = ("iid", "distinct", "corrected")
WORLD = World(torch.device("cpu"))


@dataclass(frozen=True)
class Model:
    """A model's probabilities of the strings, for a pair."""

    log_q_Y: Tensor
    gram_YY: Tensor | None
    """Products of the gradients of log Q(y) with respect to the parameters."""


@dataclass(frozen=True)
class Result:
    """A row of the table."""

    model: str
    n: int
    drawing: Drawing
    share: float
    bias: float
    variance: float
    cosine: float


class Listing:
    """Loads models, and lists their probabilities."""

    def __init__(self) -> None:
        self.settings = OmegaConf.load(config_file("evaluate_steering", "tiny/evaluate_steering"))
        self.tokenizer = instantiate(self.settings.tokenizer)
        self.template = instantiate(self.settings.template)

    def load(self, folder: Path) -> torch.nn.Module:
        return load_whole_decoder(
            self.settings.model,
            {"_component_": "steerlm2.checkpoints.HFCheckpointer", "checkpoint_dir": str(folder)},
            self.tokenizer,
            WORLD,
            dtype=torch.float32,
            max_seq_len=1024,
            seed=0,
            compile=False,
        )

    def model(self, decoder: Any, pair: Pair, *, gradients: bool) -> Model:
        """The pair's strings; the last of Y stands for all that are no answers."""
        turns = [Turn(USER, pair.prompt)]
        prompt = encode_prompt(self.template, self.tokenizer, SYSTEM_PROMPT, turns, pair.label)
        texts = answers(pair.prompt).texts
        responses = [encode_response(self.template, self.tokenizer, text) for text in texts]
        if not gradients:
            with torch.no_grad():
                batch = pack([Group(prompt, responses, 0)])
                return Model(with_others(response_logps(decoder, batch, WORLD)), None)
        parameters = list(decoder.parameters())
        logps, rows = [], []
        for response in responses:
            logp_1 = response_logps(decoder, pack([Group(prompt, [response], 0)]), WORLD)
            found = torch.autograd.grad(logp_1.sum(), parameters)
            rows.append(torch.cat([own.flatten() for own in found]))
            logps.append(logp_1.detach())
        log_q_Y = with_others(torch.cat(logps))
        jacobian_YW = torch.stack(rows)
        q_Y = log_q_Y.exp()
        others_W = -(q_Y[:-1].float() @ jacobian_YW) / q_Y[-1].float()
        jacobian_YW = torch.cat([jacobian_YW, others_W[None]])
        return Model(log_q_Y, (jacobian_YW @ jacobian_YW.T).double())


def with_others(logps_Y: Tensor) -> Tensor:
    """With the log-prob of all strings that aren't listed, float64."""
    logps_Y = logps_Y.double()
    others = (1 - logps_Y.exp().sum()).clamp(min=1e-12)
    return torch.cat([logps_Y, others.log()[None]])


def exact_target(pair: Pair) -> Tensor:
    """[Y] P(y|a,x), 0 for what is no answer."""
    log_p_N = answers(pair.prompt).log_posterior_NL[:, LABELS.index(pair.label)]
    return torch.cat([log_p_N.exp(), log_p_N.new_zeros(1)])


def estimates(
    log_q_Y: Tensor, logps_Y: Tensor, p_Y: Tensor, loss: SteerLM2Loss, draws_Rn: Tensor, drop: bool
) -> Tensor:
    """[R, Y] the loss's gradients with respect to log Q_theta of each string.

    Args:
        log_q_Y: of Q', which was sampled from.
        logps_Y: of the model.
        draws_Rn: the strings that were drawn.
        drop: keep an answer only the first time; draws with one answer are left out, as in
            sampling.
    """
    others = len(p_Y) - 1
    draws_Rn = draws_Rn.sort(dim=1).values
    first_Rn = torch.ones_like(draws_Rn, dtype=torch.bool)
    if drop:  # no two of the other strings are the same one
        first_Rn[:, 1:] = (draws_Rn[:, 1:] != draws_Rn[:, :-1]) | (draws_Rn[:, 1:] == others)
    kept_R = first_Rn.sum(dim=1) >= 2
    draws_Rn, first_Rn = draws_Rn[kept_R], first_Rn[kept_R]
    strings_N, sizes_R = draws_Rn[first_Rn], first_Rn.sum(dim=1)

    # One of the other strings is rare by itself; what they have in common is the ratio.
    rare_N = torch.where(strings_N == others, 2 * RARE - log_q_Y[others], 0)
    log_q_N = log_q_Y[strings_N] + rare_N
    logps_N = (logps_Y[strings_N] + rare_N).requires_grad_()
    log_p_N = p_Y.log().clamp(min=-700)[strings_N]
    w_N = target_weights(torch.zeros_like(log_p_N), log_p_N, log_q_N, sizes_R)
    value = loss(logps_N, log_q_N, w_N, sizes_R, torch.ones_like(strings_N))
    (gradient_N,) = torch.autograd.grad(value * len(sizes_R), logps_N)
    groups_N = torch.repeat_interleave(torch.arange(len(sizes_R)), sizes_R)
    gradient_RY = torch.zeros(len(sizes_R), len(p_Y), dtype=torch.float64)
    return gradient_RY.index_put((groups_N, strings_N), gradient_N, accumulate=True)


def quality(gradient_RY: Tensor, p_Y: Tensor, gram_YY: Tensor) -> tuple[float, float, float]:
    """Bias^2 and variance as shares of the exact gradient's square, and the cosine."""

    def product(a_Y: Tensor, b_Y: Tensor) -> Tensor:
        return a_Y @ gram_YY @ b_Y

    exact_Y, mean_Y = -p_Y, gradient_RY.mean(dim=0)
    square = product(exact_Y, exact_Y)
    bias = product(mean_Y - exact_Y, mean_Y - exact_Y) / square
    off_RY = gradient_RY - mean_Y
    variance = ((off_RY @ gram_YY) * off_RY).sum(dim=1).mean() / square
    cosine = product(mean_Y, exact_Y) / (square * product(mean_Y, mean_Y)).sqrt()
    return bias.item(), variance.item(), cosine.item()


def measure(
    name: str, proposal: list[Model], models: list[Model], pairs: list[Pair], num_draws: int
) -> Iterator[Result]:
    """All rows of one model."""
    for n, drawing in itertools.product(SIZES, DRAWINGS):
        generator = torch.Generator().manual_seed(n)
        draws = [
            torch.multinomial(q.log_q_Y.exp(), num_draws * n, True, generator=generator)
            for q in proposal
        ]
        for share in SHARES:
            loss = SteerLM2Loss("none", share, n if drawing == "corrected" else None)
            rows = []
            for pair, q, model, drawn in zip(pairs, proposal, models, draws, strict=True):
                assert model.gram_YY is not None
                p_Y, drawn_Rn = exact_target(pair), drawn.view(num_draws, n)
                gradient_RY = estimates(
                    q.log_q_Y, model.log_q_Y, p_Y, loss, drawn_Rn, drawing != "iid"
                )
                rows.append(quality(gradient_RY, p_Y, model.gram_YY))
            yield Result(
                name,
                n,
                drawing,
                share,
                *(statistics.median(each) for each in zip(*rows, strict=True)),
            )


def table(results: list[Result]) -> str:
    lines = ["| model | n | answers | " + " | ".join(f"{share:g}" for share in SHARES) + " |"]
    lines.append("|---" * (3 + len(SHARES)) + "|")
    for key, own in itertools.groupby(results, lambda r: (r.model, r.n, r.drawing)):
        cells = (f"{r.bias:.2f}, {r.variance:.2f}, {r.cosine:.2f}" for r in own)
        lines.append(f"| {' | '.join(map(str, key))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: list[Result], file: Path) -> None:
    """Bias^2 and variance over the share, a panel for each model, corrected draws."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(result.model for result in results))
    figure, panels = plt.subplots(
        1, len(names), figsize=(4 * len(names), 3.6), sharey=True, squeeze=False
    )
    for panel, name in zip(panels[0], names, strict=True):
        for n, color in zip(SIZES, ("tab:orange", "tab:blue"), strict=True):
            own = [r for r in results if (r.model, r.n, r.drawing) == (name, n, "corrected")]
            shares = [r.share for r in own]
            panel.plot(shares, [r.bias for r in own], color=color, label=f"bias², n={n}")
            panel.plot(
                shares, [r.variance for r in own], "--", color=color, label=f"variance, n={n}"
            )
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("share of the baseline")
        panel.set_xticks(SHARES)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("of the exact gradient's square")
    panels[0][0].set_ylim(bottom=0)
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--proposal", type=Path, required=True, help="Q', of a quickstart")
    parser.add_argument("--trained", nargs="*", default=[], metavar="[NAME=]DIR")
    parser.add_argument("--pairs", type=int, default=20, help="at most 20: one of each question")
    parser.add_argument("--draws", type=int, default=2000, help="of n answers, for each pair")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    # The questions in turn, the labels spread over the 20 of each that are sampled for.
    by_question = [
        list(own) for _, own in itertools.groupby(grammar_pairs("train"), lambda p: p[0])
    ]
    pairs = [own[7 * i % len(own)] for i, own in enumerate(by_question[: args.pairs])]

    listing = Listing()
    folders = {"start": args.proposal}
    for text in args.trained:
        name, _, folder = text.rpartition("=")
        folders[name or Path(folder).name] = Path(folder)
    results: list[Result] = []
    proposal: list[Model] = []
    for name, folder in folders.items():
        decoder = listing.load(folder)
        models = [listing.model(decoder, pair, gradients=True) for pair in pairs]
        proposal = proposal or models
        results += measure(name, proposal, models, pairs, args.draws)
        seconds = time.process_time() - started
        kl = statistics.mean(
            torch.xlogy(p_Y, p_Y).sum().item() - (p_Y @ model.log_q_Y).item()
            for pair, model in zip(pairs, models, strict=True)
            for p_Y in [exact_target(pair)]
        )
        print(f"{name}: KL {kl:.3f} over the pairs, {seconds:.0f} s of CPU time so far", flush=True)
    print("\nbias^2, variance, cosine, by the share of the baseline:\n")
    print(table(results))
    if args.json:
        rows = [dataclasses.asdict(result) for result in results]
        args.json.write_text(json.dumps({"draws": args.draws, "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
