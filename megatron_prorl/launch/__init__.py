"""Starting the trainer ranks: on this node, and by NeMo-Run on a cluster. NeMo-Run is imported when it is needed."""

from megatron_prorl.launch.task import prorl_task

__all__ = ["prorl_task"]
