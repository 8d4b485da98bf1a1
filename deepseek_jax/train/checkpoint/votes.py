"""How the processes of a run agree that a checkpoint is written: each votes, process 0 decides, all within a deadline.

    verdict = Ballot(3600).decide("5f2c91aa", failure=None, content="…", conclude=commit)    # "" or why it failed

No collective is involved, for they belong to the training that continues meanwhile, and one that a process does not
reach would hold up all the others. Words travel through the store of JAX's coordination service. Whoever fails says so
at once, and everybody knows: nobody waits at a barrier for a process whose upload was refused.
"""

import contextlib
import json
import time
from collections.abc import Callable

import jax

from deepseek_jax import compat

VERDICT = "deepseek_jax/checkpoint/verdict"
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 1.0
# That the others wait longer than process 0, which has the lists of all to read and a manifest to write.
GRACE_S, GRACE_OF_ONE_S = 60.0, 0.25


class Ballot:
    """Decisions of all processes of a run, each under a topic of its own; `deadline_s` is for all votes of one."""

    def __init__(self, deadline_s: float):
        self.deadline_s = deadline_s
        self.index, self.count = jax.process_index(), jax.process_count()
        self._store = compat.process_store() if self.count > 1 else None

    def decide(self, topic: str, failure: str, content: str, conclude: Callable[[list[str]], None]) -> str:
        """Votes and returns the verdict: "" for success, else why it failed; called by all, in any thread.

        Args:
            topic: the same on all processes, and new each time.
            failure: why this process cannot agree; "" if it does.
            content: what it hands to process 0.
            conclude: what process 0 does with the contents of all; an exception of it is the verdict.
        """
        if self._store is None:
            return failure or _concluded(conclude, [content])
        vote = json.dumps({"topic": topic, "failure": failure, "content": content})
        try:
            self._store.set(_key(self.index), vote)
            if self.index:
                grace_s = GRACE_S + GRACE_OF_ONE_S * self.count
                return self._awaited(VERDICT, topic, self.deadline_s + grace_s)["failure"]
            verdict = self._counted(topic, conclude)
        except TimeoutError as error:
            verdict = str(error)
        except jax.errors.JaxRuntimeError as error:
            verdict = f"the other processes cannot be asked ({str(error).splitlines()[0][:200]})"
        except Exception as error:
            verdict = reason(error)
        if not self.index:  # the others wait for it, whatever it is; what is concluded stays so if they cannot hear it
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._store.set(VERDICT, json.dumps({"topic": topic, "failure": verdict}))
        return verdict

    def _counted(self, topic: str, conclude: Callable[[list[str]], None]) -> str:
        end, contents = time.monotonic() + self.deadline_s, []
        for index in range(self.count):
            try:
                vote = self._awaited(_key(index), topic, end - time.monotonic())
            except TimeoutError:
                return f"process {index} has not finished within {self.deadline_s:.0f} s"
            if vote["failure"]:
                return f"process {index}: {vote['failure']}"
            contents.append(vote["content"])
        return _concluded(conclude, contents)

    def _awaited(self, key: str, topic: str, seconds: float) -> dict:
        """What stands under a key, once it is about the topic; the longer it takes, the more rarely it is asked for."""
        assert self._store is not None
        end, pause_s = time.monotonic() + seconds, FIRST_PAUSE_S
        while True:
            found = json.loads(self._store.get(key) or "{}")
            if found.get("topic") == topic:
                return found
            if time.monotonic() >= end:
                raise TimeoutError(f"process 0 has not decided within {seconds:.0f} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _concluded(conclude: Callable[[list[str]], None], contents: list[str]) -> str:
    try:
        conclude(contents)
    except Exception as error:
        return reason(error)
    return ""


def reason(error: BaseException) -> str:
    """Returns why a save failed, in one line."""
    text = str(error)
    if getattr(error, "errno", None) == 28 or "ENOSPC" in text or "No space left" in text:
        return "no space left on the disk"
    if "cannot schedule new futures after" in text:  # Python is shutting down
        return "the program ended without closing its Checkpointer"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:300]


def _key(index: int) -> str:
    return f"deepseek_jax/checkpoint/vote/{index}"
