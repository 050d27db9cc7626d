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
exact gradient; medians over the pairs. Where P(a|x,y) P(y|x) is a model's it has errors of its own,
which aren't in here. What Q' gives to strings that are no answers is represented by those among
--others samples of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torchtune.modules import TransformerDecoder

from steerlm2.config.loader import instantiate
from steerlm2.data.grammar import LABELS, SYSTEM_PROMPT, Pair, answers, grammar_pairs
from steerlm2.data.packing import Group, pack
from steerlm2.data.records import STOP, USER, Turn, is_blank
from steerlm2.data.templates import encode_prompt, encode_response
from steerlm2.distributed.world import World
from steerlm2.inference.answers import answer_of, load_whole_decoder, sampling_settings
from steerlm2.inference.engines import Request, Sample
from steerlm2.inference.local import LocalEngine
from steerlm2.losses import SteerLM2Loss, target_weights
from steerlm2.pipeline.plan import config_file
from steerlm2.training.forward import response_logps

# Dimension letters: Y strings: the world's answers, then the others that were sampled. R draws of a
# group, n answers of a group, N answers of all groups, W parameters.

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
SIZES = (4, 16)
Drawing = Literal["iid", "distinct", "corrected"]
DRAWINGS: tuple[Drawing, ...] = ("iid", "distinct", "corrected")
WORLD = World(torch.device("cpu"))


@dataclass(frozen=True)
class Strings:
    """What a pair can be answered with, and how likely it is sampled."""

    prompt: list[int]
    responses: list[list[int]]
    p_Y: Tensor
    """P(y|a,x), 0 for what is no answer."""
    drawn_Y: Tensor
    """The probability of a sample of Q', in which other strings are those that were sampled."""


@dataclass(frozen=True)
class Model:
    """A model's log-probs of a pair's strings."""

    logps_Y: Tensor
    gram_YY: Tensor
    """Products of their gradients with respect to the parameters."""


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

    def load(self, folder: Path) -> TransformerDecoder:
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

    def engine(self, folder: Path, n: int) -> LocalEngine:
        """Samples n strings at temperature 1."""
        settings = sampling_settings(
            self.template, self.tokenizer, n=n, temperature=1, top_p=1, max_new_tokens=64
        )
        return LocalEngine(self.load(folder), settings, max_cache_tokens=1 << 16)

    def strings(self, decoder: TransformerDecoder, engine: LocalEngine, pair: Pair) -> Strings:
        """The answers, and what else is among the engine's samples of Q'."""
        turns = [Turn(USER, pair.prompt)]
        prompt = encode_prompt(self.template, self.tokenizer, SYSTEM_PROMPT, turns, pair.label)
        table = answers(pair.prompt)
        responses = [encode_response(self.template, self.tokenizer, text) for text in table.texts]
        with torch.no_grad():
            logps_N = response_logps(decoder, pack([Group(prompt, responses, 0)]), WORLD)
            [samples] = engine.sample([Request(prompt, seed=0)])
        known = {tuple(response) for response in responses}
        counts: Counter[tuple[int, ...]] = Counter()
        for sample in samples:
            whole = sample.finish_reason == STOP and tuple(sample.tokens) not in known
            if whole and not self._is_left_out(sample):
                counts[tuple(sample.tokens)] += 1
        log_p_N = table.log_posterior_NL[:, LABELS.index(pair.label)]
        shares = torch.tensor(list(counts.values()), dtype=torch.float64) / len(samples)
        return Strings(
            prompt,
            responses + [list(tokens) for tokens in counts],
            torch.cat([log_p_N.exp(), torch.zeros_like(shares)]),
            torch.cat([logps_N.double().exp(), shares]),
        )

    def _is_left_out(self, sample: Sample) -> bool:
        answer = answer_of(sample, self.template, self.tokenizer)
        return answer.encodes_otherwise or answer.is_broken or is_blank(answer.value)

    def model(self, decoder: TransformerDecoder, strings: Strings) -> Model:
        """Log-probs of the strings one after the other, and their gradients' products."""
        parameters = list(decoder.parameters())
        logps, rows = [], []
        for response in strings.responses:
            logp_1 = response_logps(decoder, pack([Group(strings.prompt, [response], 0)]), WORLD)
            found = torch.autograd.grad(logp_1.sum(), parameters)
            rows.append(torch.cat([own.flatten() for own in found]))
            logps.append(logp_1.detach().double())
        jacobian_YW = torch.stack(rows)
        return Model(torch.cat(logps), (jacobian_YW @ jacobian_YW.T).double())


def estimates(
    log_q_Y: Tensor, logps_Y: Tensor, p_Y: Tensor, loss: SteerLM2Loss, draws_Rn: Tensor, drop: bool
) -> Tensor:
    """[R, Y] the loss's gradients with respect to log Q_theta of each string.

    Args:
        log_q_Y: of Q', which was sampled from.
        logps_Y: of the model.
        draws_Rn: the strings that were drawn.
        drop: keep a string only the first time; draws of a single one are left out, as in sampling.
    """
    draws_Rn = draws_Rn.sort(dim=1).values
    kept_Rn = torch.ones_like(draws_Rn, dtype=torch.bool)
    if drop:
        kept_Rn[:, 1:] = draws_Rn[:, 1:] != draws_Rn[:, :-1]
        several_R = kept_Rn.sum(dim=1) >= 2
        draws_Rn, kept_Rn = draws_Rn[several_R], kept_Rn[several_R]
    strings_N, sizes_R = draws_Rn[kept_Rn], kept_Rn.sum(dim=1)
    log_q_N, logps_N = log_q_Y[strings_N], logps_Y[strings_N].requires_grad_()
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
    name: str, proposal: list[Model], models: list[Model], listed: list[Strings], num_draws: int
) -> Iterator[Result]:
    """All rows of one model."""
    for n, drawing in itertools.product(SIZES, DRAWINGS):
        generator = torch.Generator().manual_seed(n)
        draws = [
            torch.multinomial(own.drawn_Y, num_draws * n, True, generator=generator)
            for own in listed
        ]
        for share in SHARES:
            loss = SteerLM2Loss("none", share, n if drawing == "corrected" else None)
            rows = []
            for own, q, model, drawn in zip(listed, proposal, models, draws, strict=True):
                gradient_RY = estimates(
                    q.logps_Y,
                    model.logps_Y,
                    own.p_Y,
                    loss,
                    drawn.view(num_draws, n),
                    drop=drawing != "iid",
                )
                rows.append(quality(gradient_RY, own.p_Y, model.gram_YY))
            medians = [statistics.median(values) for values in zip(*rows, strict=True)]
            yield Result(name, n, drawing, share, *medians)


def summary(listed: list[Strings], models: list[Model]) -> str:
    """Means over the pairs."""
    kl, mass = [], []
    for own, model in zip(listed, models, strict=True):
        kl.append((torch.xlogy(own.p_Y, own.p_Y) - own.p_Y * model.logps_Y).sum().item())
        mass.append(model.logps_Y[own.p_Y > 0].exp().sum().item())
    return f"KL {statistics.mean(kl):.3f}, mass of the answers {statistics.mean(mass):.3f}"


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
    panels[0][0].set_yscale("log")
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
    parser.add_argument("--others", type=int, default=500, help="samples to find strings in")
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
    listed: list[Strings] = []
    for name, folder in folders.items():
        decoder = listing.load(folder)
        if not listed:
            engine = listing.engine(folder, args.others)
            listed = [listing.strings(decoder, engine, pair) for pair in pairs]
        models = [listing.model(decoder, own) for own in listed]
        proposal = proposal or models
        results += measure(name, proposal, models, listed, args.draws)
        seconds = time.process_time() - started
        print(f"{name}: {summary(listed, models)}; {seconds:.0f} s of CPU time so far", flush=True)
    print("\nbias^2, variance, cosine, by the share of the baseline:\n")
    print(table(results))
    if args.json:
        rows = [dataclasses.asdict(result) for result in results]
        args.json.write_text(json.dumps({"draws": args.draws, "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
