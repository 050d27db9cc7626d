"""Functions on torchtune's decoders that training needs; the decoders' code stays unchanged.

Dimension letters: T tokens, D hidden, V vocabulary.

They make a decoder's forward end at the final norm (the output matrix is applied in chunks by
`steerlm2.models.logprobs`), and give the tensor-parallel layout of each module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
)
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import DoRALinear, LoRALinear
from torchtune.modules.tied_linear import TiedLinear

from steerlm2.models.attention import HEADS_DIM, attend
from steerlm2.models.reward_head import RewardHead
from steerlm2.models.rope import rotates_halves

PACKED_LENGTH_LIMIT = 1 << 30
"""Tokens of a packed sequence. It can be longer than the model's context, because its position ids
restart in every prompt; this is only a number that none reaches."""

LEAST_HEAD = 16
"""The least size of a head in FlexAttention's kernels (torch 2.11 to 2.13)."""


def end_at_hidden_states(decoder: TransformerDecoder) -> None:
    """Make `decoder(tokens, mask=..., input_pos=...)` return the hidden states after the norm.

    It then accepts packed sequences longer than its context, and attention blocks as a mask.
    """
    decoder.unembed = lambda hidden: decoder.norm(hidden)
    decoder.max_seq_len = PACKED_LENGTH_LIMIT
    for layer in decoder.layers:
        queries_per_key = layer.attn.num_heads // layer.attn.num_kv_heads
        layer.attn._attention_call = partial(attend, queries_per_key=queries_per_key)


def output_weight(decoder: TransformerDecoder) -> Tensor:
    """The output matrix [V, D] (under tensor parallel this rank's rows), tied or not."""
    tied = isinstance(decoder.output, TiedLinear)
    weight = decoder.tok_embeddings.weight if tied else decoder.output.weight
    return weight.to_local() if isinstance(weight, DTensor) else weight


def gather_sequence(hidden: Tensor, *, sharded_use: bool = True) -> Tensor:
    """Hidden states [1, T, D] of all T tokens on every tensor-parallel rank.

    Args:
        hidden: [1, T, D], sharded over T under tensor parallel.
        sharded_use: True: each rank computes its vocabulary shard's part of the loss, so the ranks'
            gradients are summands, which one collective reduces and scatters over the sequence.
            False: all ranks compute the same, and have the same gradients.
    """
    if not isinstance(hidden, DTensor):
        return hidden
    gradient: Placement = Partial() if sharded_use else Replicate()
    return hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[gradient])


def tensor_parallel_plan(decoder: TransformerDecoder) -> dict[str, ParallelStyle]:
    """The layout of every module by name: sequence-sharded activations between the linear layers.

    Norms are sequence-parallel, so that all parameters are on one mesh (torch can't compute a
    gradient norm over parameters on different meshes).
    """
    plan: dict[str, ParallelStyle] = {
        "tok_embeddings": EmbeddingParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
    }
    if isinstance(decoder.output, RewardHead):
        plan["output"] = Replicated()
    elif not isinstance(decoder.output, TiedLinear):
        plan["output"] = ColwiseParallel()
    for i, layer in enumerate(decoder.layers):
        prefix = f"layers.{i}"
        plan[f"{prefix}.sa_norm"] = SequenceParallel()
        plan[f"{prefix}.mlp_norm"] = SequenceParallel()
        plan[f"{prefix}.attn"] = PrepareModuleInput(
            input_layouts=(Shard(1), Shard(1)), desired_input_layouts=(Replicate(), Replicate())
        )
        plan[f"{prefix}.mlp"] = PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
        )
        if layer.attn.q_norm is not None:
            # Each rank has its heads' part of the gradient of a norm that all heads share.
            heads = SequenceParallel(sequence_dim=HEADS_DIM, use_local_output=True)
            plan |= {f"{prefix}.attn.q_norm": heads, f"{prefix}.attn.k_norm": heads}
        for name in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.w1", "mlp.w3"):
            lora = isinstance(layer.get_submodule(name), LoRALinear)
            columns = LoRAParallel(Shard(0), Shard(-1)) if lora else ColwiseParallel()
            plan[f"{prefix}.{name}"] = columns
        for name in ("attn.output_proj", "mlp.w2"):
            lora = isinstance(layer.get_submodule(name), LoRALinear)
            rows = RowwiseParallel(output_layouts=Shard(1))
            plan[f"{prefix}.{name}"] = LoRAParallel(Shard(1), Shard(1)) if lora else rows
    return plan


def unsupported_parts(decoder: TransformerDecoder) -> Iterator[str]:
    """Problems of a decoder with parts that training would ignore or train wrongly."""
    if not isinstance(decoder.output, nn.Linear | TiedLinear):
        yield "an adapted output layer is not supported: set model.apply_lora_to_output=false"
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in decoder.modules()) or any(
        layer.attn.attn_dropout > 0 for layer in decoder.layers
    ):
        yield "dropout is not supported: set it to 0 in `model`"
    if any(isinstance(module, DoRALinear) for module in decoder.modules()):
        yield "DoRA is not supported: set model.use_dora=false"


def gpu_problems(decoder: TransformerDecoder) -> Iterator[str]:
    """Problems of a decoder with FlexAttention's kernels, by which a GPU computes attention."""
    if decoder.head_dim < LEAST_HEAD:
        yield (
            f"attention on a GPU takes heads of {LEAST_HEAD} numbers or more, and the model's have "
            f"{decoder.head_dim}: set device=cpu, or another `model`"
        )


def divide_heads(decoder: TransformerDecoder, tp_size: int) -> None:
    """Set the attention modules' numbers of heads to those of this rank."""
    for layer in decoder.layers:
        layer.attn.num_heads //= tp_size
        layer.attn.num_kv_heads //= tp_size


def tensor_parallel_problems(decoder: TransformerDecoder, tp_size: int) -> Iterator[str]:
    """Problems of splitting a decoder over `tp_size` ranks."""
    attention = decoder.layers[0].attn
    mlp = decoder.layers[0].mlp
    for name, size in (
        ("attention heads", attention.num_heads),
        ("key/value heads", attention.num_kv_heads),
        ("MLP units", mlp.w1.weight.shape[0]),
        ("vocabulary entries", decoder.tok_embeddings.num_embeddings),
    ):
        if size % tp_size:
            yield f"the model's {size} {name} can't be split over {tp_size} tensor-parallel ranks"


class EmbeddingParallel(RowwiseParallel):
    """Vocabulary-parallel embedding that waits for its collective.

    torch's style returns a tensor whose collective is pending. In a compiled layer such an input
    has no gradient, so the embedding would silently not be trained (torch 2.13).
    """

    @staticmethod
    def _prepare_output_fn(
        output_layouts: tuple[Placement, ...],
        use_local_output: bool,
        mod: nn.Module,
        outputs: DTensor,
        device_mesh: DeviceMesh,
    ) -> Tensor:
        return outputs.redistribute(placements=output_layouts).to_local()


class Replicated(ParallelStyle):
    """Parameters replicated on every tensor-parallel rank, as DTensors on the common mesh."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            whole = distribute_tensor(parameter, device_mesh, [Replicate()])
            module.register_parameter(
                name, nn.Parameter(whole, requires_grad=parameter.requires_grad)
            )
        return module


class LoRAParallel(ParallelStyle):
    """A tensor-parallel `LoRALinear`: y = W x + (alpha / rank) B A x.

    Column-parallel: W, its bias and B hold rows (this rank's outputs), A is on every rank.
    Row-parallel: W and A hold columns (this rank's inputs), B is on every rank.

    Args:
        weight: how W is sharded: Shard(0) is column-parallel, Shard(1) row-parallel.
        output_layout: the layout of the output.
    """

    def __init__(self, weight: Shard, output_layout: Placement) -> None:
        super().__init__()
        columns = weight.dim == 0
        self.layouts: dict[str, Placement] = {
            "weight": weight,
            "bias": Shard(0) if columns else Replicate(),
            "lora_a.weight": Replicate() if columns else Shard(1),
            "lora_b.weight": Shard(0) if columns else Replicate(),
        }
        self.input_layout: Placement = Replicate() if columns else Shard(-1)
        self.output_layout = output_layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            layout = self.layouts[name]
            sharded = distribute_tensor(parameter, device_mesh, [layout])
            module.get_submodule(owner).register_parameter(
                leaf, nn.Parameter(sharded, requires_grad=parameter.requires_grad)
            )

        def shard_input(module: nn.Module, inputs: tuple[Tensor]) -> DTensor:
            (hidden,) = inputs
            if isinstance(hidden, DTensor):
                return hidden
            return DTensor.from_local(hidden, device_mesh, [self.input_layout])

        def local_output(module: nn.Module, inputs: tuple[Tensor], output: DTensor) -> Tensor:
            return output.redistribute(placements=[self.output_layout]).to_local()

        module.register_forward_pre_hook(shard_input)
        module.register_forward_hook(local_output)
        return module


@dataclass(frozen=True)
class HeadShape:
    """The attention heads of a whole model, and the order of the rows that make them.

    Args:
        rotates_halves: as of `families.Family`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotates_halves: bool


def head_shape(decoder: TransformerDecoder) -> HeadShape:
    """That of the whole model, on every rank."""
    attention = decoder.layers[0].attn
    return HeadShape(
        decoder.num_heads,
        attention.k_proj.weight.shape[0] // decoder.head_dim,
        decoder.head_dim,
        rotates_halves=rotates_halves(attention.pos_embeddings),
    )


def context_length(decoder: TransformerDecoder) -> int:
    """The rotary embedding's number of positions; a prompt with its response must fit."""
    return decoder.layers[0].attn.pos_embeddings.max_seq_len


def pair_cost(decoder: TransformerDecoder) -> float:
    """FLOPs of attending to one token, over the FLOPs of a token's weights, in all layers.

    A pair takes 2 multiply-adds per layer and attention dimension (query-key and weight-value), a
    token one per weight of the layers. It is that of the whole model, also on a tensor-parallel
    rank.
    """
    weights = sum(parameter.numel() for parameter in decoder.layers.parameters())
    return 2 * len(decoder.layers) * decoder.num_heads * decoder.head_dim / weights
