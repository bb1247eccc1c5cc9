"""Checkpoints of a run: Orbax, asynchronous, with the data iterator in the same step."""

import pathlib

import grain
import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints/<step>/ folders of a workdir."""

    def __init__(self, workdir, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        return self.manager.latest_step()

    def save(self, state: dict, iterator):
        """Starts writing `state` and the iterator's position as step state["step"]."""
        self.manager.save(
            int(state["step"]),
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(iterator)),
        )

    def restore(self, state: dict, iterator=None) -> dict:
        """The newest checkpoint, in the shapes, dtypes and shardings of `state`; moves the iterator to its place.

        Raises:
            ValueError: it is damaged, or holds another state: another model's, or another optimizer's.
        """
        args = {"state": ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))}
        if iterator is not None:
            args["data"] = grain.checkpoint.CheckpointRestore(iterator)
        try:
            return self.manager.restore(self.latest_step(), args=ocp.args.Composite(**args))["state"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.directory / str(self.latest_step())} does not fit this run: it is damaged, or was made with"
                f" another config.model, config.train.ema_decay or train_embeddings: {error}"
            ) from error

    def wait(self):
        """Returns when everything is on disk."""
        self.manager.wait_until_finished()

    def close(self):
        self.manager.close()
