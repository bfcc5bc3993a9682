"""The Lightning strategy that shards a stage over all devices."""

from __future__ import annotations

from lightning.pytorch.strategies import ModelParallelStrategy

__all__ = ["ShardedStrategy"]


class ShardedStrategy(ModelParallelStrategy):
    """Shard weights, gradients, optimiser state and the moving average over all ranks (FSDP2).

    Stages shard themselves in `configure_model`, block by block, when this strategy gives them a mesh.
    Checkpoints are folders to which each rank writes its part; they resume on another number of ranks.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=True)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
