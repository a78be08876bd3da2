"""Make an optimizer step independent of how its rows are divided among forwards and ranks.

The losses of the stages are sums, divided by counts of the whole step, so they are independent already. This module
does the same for four other things:

- Rows of the last step of an epoch. There may be too few for all ranks. accelerate would repeat rows from the beginning
  of the epoch, which would then count twice. Here a rank without a row gets a forward of a *blank* row, from which
  nothing is learned. It needs a forward because the forwards of all ranks exchange experts and weights.
- Losses on routers. Each is a mean over the tokens of one forward, so it is weighted by the forward's share of the
  step's tokens. It uses the loads of experts from the step before (`RouterBalance`). TRL computes its losses from
  hidden states, without any loss on routers for Llama 4, so the router loss is taken from the output of the layers and
  added to TRL's loss.
- The count of tokens, which leaves out the blank rows.
- Dropout of adapters, which depends on row and step (`TokenDropout`). This module passes it the step.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from posttrain.model.router_balance import RouterBalance, native_layers
from posttrain.tune.dropout import RowKeys
from posttrain.tune.examples import PICTURES

_BATCH_ROWS = 256
IGNORED = -100  # the label of a token that is not trained on


def rows_and_blank(rows: Iterable[Mapping[str, Any]], blank: Mapping[str, Any], folder: Path | None = None) -> Any:
    """The `datasets.Dataset` of a `StepTrainer`: the rows, and the blank row as the last one.

    A row holds lists of whole numbers, and of texts under PICTURES. The rows are written to a file in `folder`, or in
    the folder for temporary files, and read from there, so that few of them are in memory.
    """
    import pyarrow as pa
    from datasets import Dataset

    schema = pa.schema([(name, pa.list_(pa.string() if name == PICTURES else pa.int64())) for name in blank])
    waiting: list[dict[str, Any]] = []
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".arrow") as file:  # the map outlives the file's name
        with pa.ipc.new_stream(file.name, schema) as stream:
            for row in chain(map(dict, rows), [dict(blank)]):
                waiting.append(row)
                if len(waiting) == _BATCH_ROWS:
                    stream.write_table(pa.Table.from_pylist(waiting, schema))
                    waiting = []
            stream.write_table(pa.Table.from_pylist(waiting, schema))
        return Dataset.from_file(file.name)


def fed_tokens(batch: Mapping[str, Any]) -> int:
    """How many tokens one forward has, without padding; 0 for a forward from which nothing is learned."""
    trained = batch["completion_mask"] if "completion_mask" in batch else batch["labels"] != IGNORED
    if not trained.any():
        return 0
    return int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()


class EvenBatches:
    """The batches of a `BatchSampler`, and then so many blank batches that every rank gets the same number.

    It has the attributes that accelerate and `DataLoader` read from a batch sampler.
    """

    def __init__(self, batches: Any, ranks: int, blank: int):
        """blank: index of the blank row."""
        self._batches = batches
        self._blank = blank
        self._added = -len(batches) % ranks
        self.sampler = batches.sampler
        self.batch_size: int = batches.batch_size
        self.drop_last = False

    def __len__(self) -> int:
        return len(self._batches) + self._added

    def __iter__(self) -> Iterator[list[int]]:
        yield from self._batches
        yield from ([self._blank] for _ in range(self._added))


class StepTrainer:
    """Mix-in for a TRL trainer class, to be named before it among the bases. The last row of its dataset is blank.

    tokens_seen: how many tokens all ranks have trained on so far, without padding. router_balance: counts the choices
    of the routers; None if the model has no native experts. row_keys: the keys of `TokenDropout`; None without dropout.
    """

    model: Any
    state: Any
    control: Any
    accelerator: Any
    train_dataset: Any
    loss_is_scaled_for_ga = True  # losses are divided by counts of the step; transformers must not divide them again
    tokens_seen = 0
    router_balance: RouterBalance | None = None
    row_keys: RowKeys | None = None
    _step_tokens = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return super()._get_train_sampler(rows.select(range(len(rows) - 1)))  # type: ignore[misc]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, unless the training has ended early before it was resumed."""
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def get_train_dataloader(self) -> Any:
        """The batches of this rank. Every rank has the same number of batches."""
        from accelerate.data_loader import BatchSamplerShard

        loader = super().get_train_dataloader()  # type: ignore[misc]
        shard = loader.batch_sampler
        if isinstance(shard, BatchSamplerShard):  # with a single rank accelerate makes no shards
            shard.batch_sampler = EvenBatches(shard.batch_sampler, shard.num_processes, len(self.train_dataset) - 1)  # type: ignore[assignment]
            shard.even_batches = False
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The batches of one optimizer step on this rank, and the counts by which their losses are divided."""
        batches, counts = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        tokens = torch.tensor(sum(map(fed_tokens, batches)), device=device)
        self._step_tokens = int(self.accelerator.reduce(tokens, reduction="sum"))
        self.tokens_seen += self._step_tokens
        return batches, counts

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """One forward's share of the loss of its step, with the losses on routers."""
        assert not return_outputs, "held-out rows are evaluated by posttrain.tune.held_out"
        tokens = fed_tokens(inputs)
        if self.router_balance is not None:
            self.router_balance.counting = tokens > 0
        if self.row_keys is not None:
            self.row_keys.step = self.state.global_step
        layers = native_layers(self.model)
        losses: list[torch.Tensor] = []

        def keep(module: Any, given: Any, output: Any) -> None:
            if output.router_loss is not None:
                losses.append(output.router_loss)

        hook = layers.register_forward_hook(keep) if layers is not None else None
        try:
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)  # type: ignore[misc]
        finally:
            if hook is not None:
                hook.remove()
        if not losses:
            return loss
        share = tokens / self._step_tokens * self.accelerator.num_processes  # gradients are averaged over the ranks
        return loss + share * sum(losses)
