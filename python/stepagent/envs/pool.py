"""Many environments at once: in this process, or in worker processes that may crash or hang.

A worker process holds several environments and answers one call at a time. When it dies, or says
nothing for too long, the environment it was busy with has crashed and the process is replaced; its
other environments are brought back to where they were by replaying their actions::

    worker 0   env 0  step ✓         replaced →  env 0  reset, step, …, step: as recorded
               env 2  step ✗ SIGKILL             env 2  crashed: its outcome is an `EnvCrash`
               env 4  (waiting)                  env 4  reset, step, …, then its own step

Neither gymnasium's AsyncVectorEnv (one process an environment, no recovery: one crash ends them
all) nor concurrent.futures (no worker of one's own, one death breaks the pool) does this. Workers
are forked by multiprocessing's forkserver, which is safe beside threads and CUDA, and starts a new
one in milliseconds because it has imported this package once.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from .answers import BadAnswer, checked_reset, checked_step
from .base import ExpertUnavailable, TextEnv, check_seeds, known_action

EnvFactory = Callable[[], TextEnv]
Call = tuple[int, str, tuple[Any, ...]]  # the environment's place, a method, its arguments

# An exception in one of these is the environment's, a crash, and so is an answer that is none.
_STEPS: dict[str, Callable[[Any], Any]] = {"reset": checked_reset, "step": checked_step}
# What is asked about an environment, where it is.
_ABOUT: dict[str, Callable[..., Any]] = {"check_seeds": check_seeds, "known_action": known_action}
# What every worker would import again; what is not installed is passed over.
_PRELOADED = ["__main__", __name__, "stepagent.envs.babyai"]
WORKER_TIMEOUT = 60.0  # seconds
_GRACE = 2.0  # seconds in which an idle worker closes its environments before it is killed


class EnvCrash(RuntimeError):
    """The environment at ``place`` raised, died with its process, or hung: see ``reason``."""

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(place, reason)
        self.place, self.reason = place, reason

    def __str__(self) -> str:
        return self.reason


class EnvPool(Protocol):
    """Environments by place, 0, 1, …; each is made when it is first called."""

    def env(self, place: int) -> TextEnv:
        """The environment at this place, to be asked."""

    def call(self, calls: Sequence[Call]) -> list[Any]:
        """The answer to each call of ``reset`` or ``step``, or an `EnvCrash`.

        At most one call per place. After a crash the place needs a ``reset``, for which it gets a
        new environment. What raises while an environment is made is raised here.
        """


@contextmanager
def open_pool(make: EnvFactory, workers: int, timeout: float | None) -> Iterator[EnvPool]:
    """A pool in this process (``workers=0``) or in that many others, closed in the end.

    Args:
        timeout: Seconds that one call may take; None: `WORKER_TIMEOUT` in a worker, any time in
            this process. Here a call is interrupted where it runs Python code or waits: one that
            never leaves a library's C code is not, for which there are workers.
    """
    pool: LocalPool | WorkerPool
    if workers:
        pool = WorkerPool(make, workers, WORKER_TIMEOUT if timeout is None else timeout)
    else:
        pool = LocalPool(make, timeout)
    try:
        yield pool
    finally:
        pool.close()


def expert_actions(envs: Sequence[TextEnv]) -> list[str | None]:
    """What the expert of each environment would do; None where it has no answer.

    Environments of a pool's workers are asked all at once. Raises `EnvCrash` where one crashes;
    of others that crash with it, their next call does.
    """
    remote = [env for env in envs if isinstance(env, _RemoteEnv)]
    if remote and len(remote) == len(envs):
        return remote[0].pool.expert_actions([env.place for env in remote])
    return [_ask(env) for env in envs]


def ask_about(env: TextEnv, question: str, *arguments: Any) -> Any:
    """``check_seeds`` or ``known_action`` of `stepagent.envs.base`, asked where the environment is.

    Raises `EnvCrash` where it crashes meanwhile.
    """
    if isinstance(env, _RemoteEnv):
        return env.ask(question, *arguments)
    return _ABOUT[question](env, *arguments)


def _ask(env: TextEnv) -> str | None:
    try:
        return env.expert_action()
    except ExpertUnavailable:
        return None


class _Late(BaseException):
    """A call took too long; no Exception, so that no environment takes it for its own."""


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[None]:
    """`_Late` after so many seconds, by SIGALRM, which only the main thread can be sent."""
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(number: int, frame: object) -> None:
        raise _Late

    handler = signal.signal(signal.SIGALRM, late)
    before, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    start = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if before:  # somebody else's alarm
            left = before - (time.monotonic() - start)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3))


class LocalPool:
    """Environments in this process."""

    def __init__(self, make: EnvFactory, timeout: float | None = None) -> None:
        self._make, self._timeout = make, timeout
        self._envs: dict[int, TextEnv] = {}

    def env(self, place: int) -> TextEnv:
        """The environment itself."""
        if place not in self._envs:
            self._envs[place] = self._make()
        return self._envs[place]

    def call(self, calls: Sequence[Call]) -> list[Any]:
        """One after the other."""
        seeds = [arguments[0] for _, method, arguments in calls if method == "reset"]
        if len(seeds) > 1 and (prepare := getattr(self.env(calls[0][0]), "prepare", None)):
            prepare(seeds)
        return [self._answer(*call) for call in calls]

    def _answer(self, place: int, method: str, arguments: tuple[Any, ...]) -> Any:
        env = self.env(place)
        try:
            with _time_limit(self._timeout):
                answer = getattr(env, method)(*arguments)
            return _STEPS[method](answer)
        except _Late:
            reason = f"{method} took more than {self._timeout:g} s"
        except BadAnswer as error:
            reason = str(error)
        except Exception as error:
            reason = f"{method} raised {type(error).__name__}: {error}"
        with suppress(Exception, _Late), _time_limit(_GRACE):  # it is broken already
            self._envs.pop(place).close()
        return EnvCrash(place, reason)

    def close(self) -> None:
        """Close all environments."""
        while self._envs:
            self._envs.popitem()[1].close()


@dataclass(frozen=True)
class _Task:
    """A call that a worker has yet to answer; ``index`` is its place in `WorkerPool.call`.

    Without an index it is replayed, and must bring back the observation it brought then.
    """

    call: Call
    index: int | None = None
    observation: str | None = None


class WorkerPool:
    """Environments in worker processes: place p is in worker p modulo their number."""

    def __init__(self, make: EnvFactory, workers: int, timeout: float) -> None:
        self._timeout = timeout
        self._history: dict[int, list[tuple[Call, str]]] = {}  # of running episodes
        self._lost: dict[int, EnvCrash] = {}  # crashed in a replay: their next call will say so
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(_Worker(make))
        except BaseException:
            self.close()
            raise

    def env(self, place: int) -> TextEnv:
        """What asks the environment at this place."""
        return _RemoteEnv(self, place)

    def call(self, calls: Sequence[Call]) -> list[Any]:
        """All workers at once, each one call after the other."""
        outcomes = self._exchange(calls)
        for outcome in outcomes:
            if isinstance(outcome, _Raised):
                raise outcome.error
        return outcomes

    def expert_actions(self, places: Sequence[int]) -> list[str | None]:
        """As `expert_actions`, of the environments at these places."""
        answers = self._exchange([(place, "expert_action", ()) for place in places])
        crashes = [answer for answer in answers if isinstance(answer, EnvCrash)]
        self._lost |= {crash.place: crash for crash in crashes[1:]}
        if crashes:
            raise crashes[0]
        return [_expert_action(answer) for answer in answers]

    def _exchange(self, calls: Sequence[Call]) -> list[Any]:
        outcomes: dict[int, Any] = {}
        for index, (place, method, arguments) in enumerate(calls):
            crash = self._lost.pop(place, None)
            if crash is not None and method != "reset":
                outcomes[index] = crash
            else:
                self._worker(place).tasks.append(_Task((place, method, arguments), index))
        for worker in self._workers:
            worker.send(self._timeout)
        while busy := [worker for worker in self._workers if worker.tasks]:
            patience = min(worker.deadline for worker in busy) - time.monotonic()
            ready = wait([worker.connection for worker in busy], max(0.0, patience))
            for worker in busy:
                if worker.connection in ready:
                    self._receive(worker, outcomes)
                elif time.monotonic() >= worker.deadline:
                    self._replace(worker, f"took more than {self._timeout:g} s", outcomes)
        return [outcomes[index] for index in range(len(calls))]

    def close(self) -> None:
        """End all workers: those that wait close their environments, others are killed."""
        for worker in self._workers:
            worker.connection.close()
        deadline = time.monotonic() + _GRACE
        for worker in self._workers:
            worker.end(max(0.0, deadline - time.monotonic()))

    def _worker(self, place: int) -> _Worker:
        return self._workers[place % len(self._workers)]

    def _receive(self, worker: _Worker, outcomes: dict[int, Any]) -> None:
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(worker, f"ended its process ({worker.last_words()})", outcomes)
            return
        task = worker.tasks.popleft()
        if task.index is None:
            self._check_replay(worker, task, answer, outcomes)
        else:
            self._record(task.call, answer)
            outcomes[task.index] = answer
        worker.send(self._timeout)

    def _record(self, call: Call, answer: Any) -> None:
        place, method, _ = call
        if isinstance(answer, EnvCrash):
            self._history.pop(place, None)
        elif method in _STEPS and not isinstance(answer, _Raised):
            earlier = [] if method == "reset" else self._history.get(place, [])
            self._history[place] = [*earlier, (call, answer[0])]
            if method == "step" and (answer[2] or answer[3]):
                del self._history[place]

    def _check_replay(
        self, worker: _Worker, task: _Task, answer: Any, outcomes: dict[int, Any]
    ) -> None:
        if isinstance(answer, _Raised):
            raise answer.error
        if isinstance(answer, EnvCrash):
            self._lose(worker, answer, outcomes)
        elif answer[0] != task.observation:
            reason = "was lost with the process of another one: its replay took another course"
            self._lose(worker, EnvCrash(task.call[0], reason), outcomes)

    def _replace(self, worker: _Worker, what: str, outcomes: dict[int, Any]) -> None:
        """A new process, in which the other environments are brought back to where they were."""
        place, method, _ = worker.tasks[0].call
        self._lose(worker, EnvCrash(place, f"{method} {what}"), outcomes)
        worker.restart()
        waiting = [task for task in worker.tasks if task.index is not None]
        worker.tasks = deque(
            _Task(call, observation=observation)
            for place, history in self._history.items()
            if self._worker(place) is worker
            for call, observation in history
        )
        worker.tasks.extend(waiting)
        worker.send(self._timeout)

    def _lose(self, worker: _Worker, crash: EnvCrash, outcomes: dict[int, Any]) -> None:
        """Take back what is still to be asked of this environment, or remember to say so."""
        self._history.pop(crash.place, None)
        own = [task for task in worker.tasks if task.call[0] == crash.place]
        worker.tasks = deque(task for task in worker.tasks if task.call[0] != crash.place)
        asked = [task.index for task in own if task.index is not None]
        for index in asked:
            outcomes[index] = crash
        if not asked:
            self._lost[crash.place] = crash


class _RemoteEnv:
    """An environment in a worker, one call at a time; raises `EnvCrash` where it crashes."""

    def __init__(self, pool: WorkerPool, place: int) -> None:
        self.pool, self.place = pool, place

    @property
    def name(self) -> str:
        return str(self.ask("name"))

    @property
    def actions(self) -> tuple[str, ...]:
        return tuple(self.ask("actions"))

    @property
    def max_steps(self) -> int:
        return int(self.ask("max_steps"))

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        return self.ask("reset", seed)  # type: ignore[no-any-return]

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return self.ask("step", action)  # type: ignore[no-any-return]

    def expert_action(self) -> str:
        return self.ask("expert_action")  # type: ignore[no-any-return]

    def close(self) -> None:
        """Its pool closes it."""

    def ask(self, method: str, *arguments: Any) -> Any:
        """A method's answer, or an attribute."""
        (answer,) = self.pool.call([(self.place, method, arguments)])
        if isinstance(answer, EnvCrash):
            raise answer
        return answer


class _Worker:
    """A process, and the calls it has yet to answer."""

    def __init__(self, make: EnvFactory) -> None:
        self._make = make
        self.tasks: deque[_Task] = deque()
        self.deadline = 0.0  # for the first of them
        self._start()

    def _start(self) -> None:
        self.connection, theirs = _context().Pipe()
        self._process = _context().Process(target=_serve, args=(theirs, self._make), daemon=True)
        try:
            self._process.start()
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise TypeError(
                f"a worker process cannot be sent {self._make!r}: {error}; an environment that "
                "runs in workers is given by its name or by what stands at the top of a module"
            ) from error
        finally:
            theirs.close()

    def send(self, timeout: float) -> None:
        """The first call, where there is one."""
        if self.tasks:
            self.deadline = time.monotonic() + timeout
            with suppress(OSError):  # the process is dead, which receiving will tell
                self.connection.send(self.tasks[0].call)

    def last_words(self) -> str:
        """How the process ended, whose connection has."""
        self._process.join(_GRACE)
        return f"exit code {self._process.exitcode}"

    def restart(self) -> None:
        """Another process in place of this one, whatever it is doing."""
        self.connection.close()
        self.end(0.0)
        self._start()

    def end(self, patience: float) -> None:
        """The process is gone: by itself, or killed after this many seconds."""
        self._process.join(patience)
        self._process.kill()
        self._process.join()
        self._process.close()


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)  # has no effect once the server runs
    return context


@dataclass(frozen=True)
class _Raised:
    """What the caller of a method is to be told, as ExpertUnavailable."""

    error: Exception


def _expert_action(answer: Any) -> str | None:
    if isinstance(answer, _Raised) and isinstance(answer.error, ExpertUnavailable):
        return None
    if isinstance(answer, _Raised):
        raise answer.error
    return str(answer)


def _serve(connection: Connection, make: EnvFactory) -> None:
    """A worker's life: answer each call, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the workers
    signal.signal(signal.SIGTERM, _leave)
    # What an environment prints is for people, stdout may be a program's.
    with suppress(OSError):
        os.dup2(2, 1)
    sys.stdout = sys.stderr
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    pool = LocalPool(make)
    try:
        while True:
            connection.send(_answer(pool, connection.recv()))
    except (EOFError, OSError):  # of the connection: those of environments are answers
        pass
    finally:
        pool.close()


def _leave(number: int, frame: object) -> None:
    """SIGTERM closes the environments, which may have files to remove."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _exit_with_parent() -> None:
    """An environment that hangs does not outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _answer(pool: LocalPool, call: Call) -> Any:
    place, method, arguments = call
    try:
        if method in _STEPS:
            return pool.call([call])[0]
        if method in _ABOUT:
            return _ABOUT[method](pool.env(place), *arguments)
        attribute = getattr(pool.env(place), method)
        return attribute(*arguments) if callable(attribute) else attribute
    except Exception as error:
        error.add_note("in a worker process:\n" + traceback.format_exc())
        return _Raised(_portable(error))


def _portable(error: Exception) -> Exception:
    """The same where it survives pickling, which not every exception does."""
    try:
        same: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return same
