"""Weights of which several processes write parts into one segment of shared memory."""

from pathlib import Path

import pytest
import torch

from posttrain.sampling.segments import TensorPart, TensorSpec, WrittenPart, write_parts
from posttrain.sampling.weights import SharedWeights, WeightTransferError, open_weights, verify


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "embedding": torch.randn(33, 8),
        "experts.gate_up_proj": torch.randn(6, 8, 10),
        "norm": torch.randn(8).bfloat16(),
        "experts.down_proj": torch.randn(6, 5, 8).bfloat16(),
    }


def specs() -> list[TensorSpec]:
    return [TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in tensors().items()]


def parts(rank: int, world: int) -> list[TensorPart]:
    """Of the experts each rank has its own; the others alternate."""
    found = []
    for number, (name, value) in enumerate(tensors().items()):
        if "experts" in name:
            found.append(TensorPart(number, value.chunk(world)[rank], rank, world))
        elif number // 2 % world == rank:
            found.append(TensorPart(number, value))
    return found


@pytest.fixture
def weights(tmp_path: Path):
    made = SharedWeights(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_parts_of_ranks_are_bit_for_bit_what_one_process_writes(weights: SharedWeights, world: int):
    alone = weights.publish(specs(), tensors().values(), 0)
    place = weights.begin(specs(), 1)
    written = [part for rank in range(world) for part in write_parts(place, specs(), parts(rank, world))]
    together = weights.finish(specs(), reversed(written), 1)
    assert Path(together.path).read_bytes() == Path(alone.path).read_bytes()
    assert together.num_bytes == alone.num_bytes
    assert [len(entry.checksums) for entry in together.tensors] == [1, world, 1, world]
    verify(together)
    found = dict(open_weights(together))
    assert found.keys() == tensors().keys()
    assert all(found[name].equal(value) for name, value in tensors().items())


def test_a_part_that_was_not_written_and_one_that_is_damaged_are_named(weights: SharedWeights):
    place = weights.begin(specs(), 4)
    written = [part for rank in range(2) for part in write_parts(place, specs(), parts(rank, 2))]
    manifest = weights.finish(specs(), written, 4)
    missing = [part for part in written if part != WrittenPart(3, 1, 2, part.checksum)]
    with pytest.raises(WeightTransferError, match=r"policy version 4: of tensor experts\.down_proj a part is missing"):
        weights.finish(specs(), missing, 4)
    with pytest.raises(WeightTransferError, match="of tensor embedding a part is missing"):
        weights.finish(specs(), [part for part in written if part.tensor], 4)
    with open(manifest.path, "r+b") as segment:
        segment.seek(manifest.tensors[1].offset + 3 * 8 * 10 * 4 + 5)  # in the second part
        segment.write(b"\xff\x01")
    with pytest.raises(WeightTransferError, match=r"tensor experts\.gate_up_proj has checksum"):
        verify(manifest)
