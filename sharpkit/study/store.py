"""The file of a study: every score that was measured, in SQLite, safe against interrupts.

Each score is committed as soon as it is there, in write-ahead mode, so that other processes
read while one writes. Who works at a checkpoint holds a claim on it; a claim whose owner is
no longer there can be taken over.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sharpkit.errors import StoreError
from sharpkit.results import Score
from sharpkit.study.identity import Subject, settings_text
from sharpkit.study.owner import Owner

__all__ = ["APPLICATION_ID", "FATAL", "SCHEMA_VERSION", "Begun", "Entry", "Store"]

APPLICATION_ID = 0x53484B54  # "SHKT": marks the file as a study
SCHEMA_VERSION = 1
MAGIC = b"SQLite format 3\0"
FATAL = 2  # workers that died at a measure, alone on the machine, before it is given up
BUSY = 60.0  # seconds to wait while another process writes

SCHEMA = """
CREATE TABLE subject(
    key TEXT PRIMARY KEY, weights TEXT, recipe TEXT, data TEXT, beside TEXT, options TEXT,
    version TEXT, provenance TEXT, created REAL
) WITHOUT ROWID;
CREATE TABLE entry(
    path TEXT, recipe TEXT, options TEXT, seed INTEGER, subject TEXT, metadata TEXT,
    error TEXT, notes TEXT, asked TEXT, updated REAL,
    PRIMARY KEY(path, recipe, options, seed)
) WITHOUT ROWID;
CREATE TABLE score(
    subject TEXT, measure TEXT, settings TEXT, seed INTEGER,
    value REAL, probe_error REAL, error_kind TEXT, data_error REAL, dof REAL,
    converged INTEGER, hvps INTEGER, gradients INTEGER, forwards INTEGER, seconds REAL,
    error TEXT, document TEXT, finished REAL,
    PRIMARY KEY(subject, measure, settings, seed)
) WITHOUT ROWID;
CREATE TABLE choice(
    subject TEXT, asked TEXT, measures TEXT, PRIMARY KEY(subject, asked)
) WITHOUT ROWID;
CREATE TABLE claim(
    subject TEXT, seed INTEGER, owner TEXT, beat REAL, measure TEXT, settings TEXT,
    PRIMARY KEY(subject, seed)
) WITHOUT ROWID;
CREATE TABLE death(
    subject TEXT, measure TEXT, settings TEXT, seed INTEGER, count INTEGER,
    PRIMARY KEY(subject, measure, settings, seed)
) WITHOUT ROWID;
CREATE INDEX entry_subject ON entry(subject);
CREATE INDEX score_measure ON score(measure);
"""

MIGRATIONS: dict[int, Callable[[sqlite3.Connection], None]] = {}
"""How a file of each older version becomes one of the next; see CONTRIBUTING.md."""

Request = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A file as one recipe and one set of options see it.

    Attributes:
        path: The checkpoint, from the study's folder if it lies in it.
        recipe: The recipe's path, likewise.
        options: As JSON, without the seed.
        seed: Of every random draw.
    """

    path: str
    recipe: str
    options: str
    seed: int


@dataclass(frozen=True)
class Begun:
    """What a worker is told when it asks for a checkpoint.

    Attributes:
        mine: Whether the claim was given; otherwise another process holds it.
        done: Measures and settings (as text) that need not be measured again.
        failed: Those of them that failed.
        chosen: What was asked for, resolved earlier; None if it was not.
        fatal: Measures and settings during which workers died again and again.
    """

    mine: bool
    done: frozenset[tuple[str, str]] = frozenset()
    failed: frozenset[tuple[str, str]] = frozenset()
    chosen: tuple[Request, ...] | None = None
    fatal: frozenset[tuple[str, str]] = frozenset()


class Store:
    """A study's file.

    Args:
        path: The file; made if there is none, unless ``read_only``.
        read_only: Only read. A file of an older version is then converted in memory.
        check: Whether to look through the whole file for damage first.

    Raises:
        StoreError: If the file is damaged, is no study, or belongs to a newer version. The
            file is then as it was.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False, check: bool = True):
        self.path, self.read_only = Path(path), read_only
        new = not self.path.exists() or self.path.stat().st_size == 0
        if new and read_only:
            if self.path.exists():
                raise StoreError(
                    f"Expected a study. {path} is empty. Name another, or score into it first."
                )
            raise StoreError(f"Expected a study. There is no file {path}. Check the spelling.")
        if not new:
            _refuse_foreign(self.path)
        elif not self.path.parent.is_dir():
            raise StoreError(
                f"Expected a folder to put the study in. {self.path.parent} does not exist."
                " Make it, or name another."
            )
        self._lock = threading.RLock()
        try:
            if not new and check:
                _refuse_damaged(self.path)
            self._connection = _connect(self.path, read_only)
            try:
                self._prepare(new)
            except BaseException:
                self._connection.close()
                raise
        except sqlite3.Error as error:
            raise _store_error(self.path, error) from error

    def _prepare(self, new: bool) -> None:
        c = self._connection
        if new:
            with self._writing(exclusive=True):  # two processes may make it at the same time
                if _pragma(c, "application_id") == 0:
                    for statement in filter(str.strip, SCHEMA.split(";")):
                        c.execute(statement)
                    c.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                    c.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        version = _pragma(c, "user_version")
        _refuse_newer(self.path, version)
        if not self.read_only:
            _write_ahead(c)
        if version < SCHEMA_VERSION:
            self._migrate(version)

    def _migrate(self, version: int) -> None:
        if self.read_only:
            memory = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            self._connection.backup(memory)
            self._connection.close()
            self._connection = memory
        with self._writing(exclusive=True):
            version = _pragma(self._connection, "user_version")  # another process may have done it
            if version < SCHEMA_VERSION and not self.read_only:
                self._keep_copy(version)
            for step in range(version, SCHEMA_VERSION):
                MIGRATIONS[step](self._connection)
                self._connection.execute(f"PRAGMA user_version = {step + 1}")

    def _keep_copy(self, version: int) -> None:
        # Of what is committed, while nobody else can write; under its name when complete.
        part = self.path.with_name(f"{self.path.name}.part")
        part.unlink(missing_ok=True)
        whole = _connect(self.path, read_only=True)
        copy = sqlite3.connect(part)
        try:
            whole.backup(copy)
        finally:
            copy.close()
            whole.close()
        os.replace(part, self.path.with_name(f"{self.path.name}.v{version}"))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _writing(self, exclusive: bool = False) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._connection.execute("BEGIN EXCLUSIVE" if exclusive else "BEGIN IMMEDIATE")
                try:
                    yield self._connection
                except BaseException:
                    self._connection.execute("ROLLBACK")
                    raise
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                raise _store_error(self.path, error) from error

    def query(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of a query.

        Raises:
            StoreError: If the file cannot be read.
        """
        with self._lock:
            try:
                return self._connection.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise _store_error(self.path, error) from error

    def relative(self, path: str | Path) -> str:
        """Return a path from the study's folder if it lies in it, otherwise in full."""
        full, folder = os.path.abspath(path), os.path.abspath(self.path.parent)
        inside = os.path.commonpath([full, folder]) == folder
        return Path(os.path.relpath(full, folder)).as_posix() if inside else full

    # -- what workers write --------------------------------------------------------------

    def begin(
        self,
        entry: Entry,
        subject: Subject,
        asked: str,
        owner: Owner,
        *,
        metadata: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        retry: bool = False,
    ) -> Begun:
        """File an entry under its subject, and claim the subject.

        Args:
            entry: The file.
            subject: What it holds.
            asked: The request for measures as text, under which its resolution is kept.
            owner: Who asks.
            metadata: What the recipe says of the file.
            provenance: What all scores of the subject share.
            retry: Whether failed measures are to be measured again.
        """
        key, now = subject.key, time.time()
        with self._writing() as c:
            c.execute(
                "INSERT OR IGNORE INTO subject VALUES (?,?,?,?,?,?,?,?,?)",
                (key, *_subject_row(subject), _json(provenance or {}), now),
            )
            self._file(c, entry, key, asked, metadata, error=None, notes=())
            held = c.execute(
                "SELECT owner, beat FROM claim WHERE subject = ? AND seed = ?", (key, entry.seed)
            ).fetchone()
            if held and held[0] != owner.text and Owner.read(held[0]).is_alive(held[1]):
                return Begun(False)
            c.execute(
                "INSERT OR REPLACE INTO claim VALUES (?,?,?,?,NULL,NULL)",
                (key, entry.seed, owner.text, now),
            )
            if retry:
                where = "subject = ? AND seed = ?"
                c.execute(
                    f"DELETE FROM score WHERE {where} AND error IS NOT NULL", (key, entry.seed)
                )
                c.execute(f"DELETE FROM death WHERE {where}", (key, entry.seed))
            done = c.execute(
                "SELECT measure, settings, error IS NULL FROM score WHERE subject = ? AND seed = ?",
                (key, entry.seed),
            ).fetchall()
            chosen = c.execute(
                "SELECT measures FROM choice WHERE subject = ? AND asked = ?", (key, asked)
            ).fetchone()
            fatal = c.execute(
                "SELECT measure, settings FROM death WHERE subject = ? AND seed = ? AND count >= ?",
                (key, entry.seed, FATAL),
            ).fetchall()
        resolved = None if chosen is None else tuple((m, s) for m, s in json.loads(chosen[0]))
        failed = frozenset((m, s) for m, s, fine in done if not fine)
        return Begun(
            True, frozenset((m, s) for m, s, _ in done), failed, resolved, frozenset(fatal)
        )

    def choose(self, key: str, asked: str, chosen: Sequence[Request]) -> None:
        """Keep what a request for measures stands for on a subject."""
        with self._writing() as c:
            c.execute(
                "INSERT OR REPLACE INTO choice VALUES (?,?,?)",
                (key, asked, _json([[m, dict(s)] for m, s in chosen])),
            )

    def start(self, key: str, seed: int, measure: str, settings: str) -> None:
        """Note which measure a worker is at, for the case that it does not come back."""
        with self._lock:  # of use while the system runs: need not be on the disk at once
            self._connection.execute("PRAGMA synchronous = NORMAL")
            try:
                with self._writing() as c:
                    c.execute(
                        "UPDATE claim SET measure = ?, settings = ?, beat = ?"
                        " WHERE subject = ? AND seed = ?",
                        (measure, settings, time.time(), key, seed),
                    )
            finally:
                self._connection.execute("PRAGMA synchronous = FULL")

    def record(self, key: str, score: Score) -> None:
        """Write a score. It is on the disk when this returns."""
        e = score.estimate
        numbers: tuple[Any, ...] = (None,) * 10
        if e is not None:
            cost = (e.cost.hvps, e.cost.gradients, e.cost.forwards, e.cost.seconds)
            numbers = (
                e.value, e.probe_error, e.error_kind, e.data_error, e.dof, int(e.converged), *cost
            )  # fmt: skip
        with self._writing() as c:
            c.execute(
                f"INSERT OR IGNORE INTO score VALUES ({','.join('?' * 17)})",
                (
                    key,
                    score.measure,
                    settings_text(score.settings),
                    score.seed,
                    *numbers,
                    score.error,
                    _json(score.to_dict()),
                    time.time(),
                ),
            )

    def beat(self, owner: Owner) -> None:
        """Say that the owner is still there."""
        with self._writing() as c:
            c.execute("UPDATE claim SET beat = ? WHERE owner = ?", (time.time(), owner.text))

    def finish(self, entry: Entry, key: str, owner: Owner, *, notes: Sequence[str] = ()) -> None:
        """Give the claim back."""
        with self._writing() as c:
            c.execute(
                "UPDATE entry SET notes = ?, updated = ?"
                " WHERE path = ? AND recipe = ? AND options = ? AND seed = ?",
                (_json(list(notes)), time.time(), *_entry_row(entry)),
            )
            self._release(c, key, entry.seed, owner)

    def fail(
        self,
        entry: Entry,
        asked: str,
        error: str,
        *,
        metadata: Mapping[str, Any] | None = None,
        claim: tuple[str, Owner] | None = None,
    ) -> None:
        """Record that a checkpoint could not be loaded, or ended early, and why.

        Args:
            entry: The file.
            asked: The request for measures.
            error: One sentence.
            metadata: What the recipe says of the file.
            claim: The subject's key and the owner of its claim, which is given back.
        """
        with self._writing() as c:
            key = claim[0] if claim else None
            self._file(c, entry, key, asked, metadata, error=error, notes=())
            if claim:
                self._release(c, claim[0], entry.seed, claim[1])

    def bury(self, owners: Sequence[str], *, count: bool) -> list[tuple[str, str]]:
        """Free the claims of workers that died.

        Args:
            owners: Texts of the owners.
            count: Whether to count a death for the measures that they were at.

        Returns:
            Subjects' keys and measures that they were at.
        """
        found = []
        with self._writing() as c:
            for text in owners:
                rows = c.execute(
                    "SELECT subject, seed, measure, settings FROM claim WHERE owner = ?", (text,)
                ).fetchall()
                for subject, seed, measure, settings in rows:
                    if measure is not None:
                        found.append((subject, measure))
                    if measure is not None and count:
                        c.execute(
                            "INSERT INTO death VALUES (?,?,?,?,1) ON CONFLICT DO UPDATE"
                            " SET count = count + 1",
                            (subject, measure, settings, seed),
                        )
                c.execute("DELETE FROM claim WHERE owner = ?", (text,))
        return found

    @staticmethod
    def _release(c: sqlite3.Connection, key: str, seed: int, owner: Owner) -> None:
        c.execute(
            "DELETE FROM claim WHERE subject = ? AND seed = ? AND owner = ?",
            (key, seed, owner.text),
        )

    @staticmethod
    def _file(
        c: sqlite3.Connection,
        entry: Entry,
        key: str | None,
        asked: str,
        metadata: Mapping[str, Any] | None,
        *,
        error: str | None,
        notes: Sequence[str],
    ) -> None:
        # The same file under a recipe that has moved is no second checkpoint.
        c.execute(
            "DELETE FROM entry WHERE path = ? AND recipe <> ? AND options = ? AND seed = ?"
            " AND subject = ?",
            (*_entry_row(entry), key),
        )
        c.execute(
            f"INSERT OR REPLACE INTO entry VALUES ({','.join('?' * 10)})",
            (
                *_entry_row(entry),
                key,
                _json(metadata or {}),
                error,
                _json(list(notes)),
                asked,
                time.time(),
            ),
        )

    # -- what is read --------------------------------------------------------------------

    def owners(self) -> list[str]:
        """Return who holds claims."""
        return [row[0] for row in self.query("SELECT DISTINCT owner FROM claim")]

    def dead(self) -> list[str]:
        """Return who holds claims and is no longer there."""
        rows = self.query("SELECT owner, max(beat) FROM claim GROUP BY owner")
        return [text for text, beat in rows if not Owner.read(text).is_alive(beat)]

    def scores(self, key: str, seed: int) -> list[Score]:
        """Return the scores of a subject, in the order in which they were finished."""
        rows = self.query(
            "SELECT document FROM score WHERE subject = ? AND seed = ? ORDER BY finished, measure",
            (key, seed),
        )
        return [Score.from_dict(json.loads(row[0])) for row in rows]


def _subject_row(subject: Subject) -> tuple[Any, ...]:
    return tuple(asdict(subject).values())


def _entry_row(entry: Entry) -> tuple[Any, ...]:
    return (entry.path, entry.recipe, entry.options, entry.seed)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _pragma(c: sqlite3.Connection, name: str) -> int:
    return int(c.execute(f"PRAGMA {name}").fetchone()[0])


def _write_ahead(c: sqlite3.Connection) -> None:
    # While another process does the same SQLite refuses at once instead of waiting.
    ends = time.monotonic() + BUSY
    while True:
        try:
            c.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > ends:
                raise
            time.sleep(0.02)
        else:
            return


def _connect(path: Path, read_only: bool) -> sqlite3.Connection:
    name = quote(os.path.abspath(path))
    mode = "rwc"
    if read_only:
        waiting = path.with_name(path.name + "-wal").exists()
        writable = os.access(path.parent, os.W_OK)
        # Write-ahead mode needs a file beside; where none can be made, none is in use.
        mode = "ro" if waiting or writable else "ro&immutable=1"
    c = sqlite3.connect(
        f"file:{name}?mode={mode}",
        uri=True,
        timeout=BUSY,
        isolation_level=None,
        check_same_thread=False,
    )
    c.execute("PRAGMA synchronous = FULL")
    return c


def _refuse_foreign(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except OSError as error:
        raise StoreError(
            f"Expected a study that can be read. {path}: {error.strerror}. Name another, or change"
            " its permissions."
        ) from error
    if not head.startswith(MAGIC):
        raise StoreError(
            f"Expected a study, which is an SQLite file. {path} is something else. Name another."
        )
    if int.from_bytes(head[68:72], "big") != APPLICATION_ID:
        raise StoreError(
            f"Expected a study. {path} is an SQLite file of another program. Name another."
        )
    _refuse_newer(path, int.from_bytes(head[60:64], "big"))  # before anything is opened


def _refuse_newer(path: Path, version: int) -> None:
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"Expected a study of format {SCHEMA_VERSION} or older. {path} has format {version}."
            " Use a newer sharpkit."
        )


def _refuse_damaged(path: Path) -> None:
    # Read-only, and as it lies there if nothing waits to be merged: nothing is touched.
    waiting = path.with_name(path.name + "-wal").exists()
    name = quote(os.path.abspath(path))
    mode = "ro" if waiting else "ro&immutable=1"
    c = sqlite3.connect(f"file:{name}?mode={mode}", uri=True, timeout=BUSY)
    try:
        found = c.execute("PRAGMA quick_check(1)").fetchone()[0]
    finally:
        c.close()
    if found != "ok":
        raise StoreError(
            f"Expected a sound study. {path} is damaged ({' '.join(str(found).split())}). Go back"
            f" to a copy, or save what is left with: sqlite3 {path} .recover"
        )


def _store_error(path: Path, error: sqlite3.Error) -> StoreError:
    text = " ".join(str(error).split())
    if isinstance(error, sqlite3.OperationalError) and "locked" in text:
        return StoreError(
            f"Expected to write to {path} within {BUSY:.0f} s. Another process holds it. Is one"
            " stuck?"
        )
    if isinstance(error, sqlite3.DatabaseError) and ("malformed" in text or "not a" in text):
        return StoreError(
            f"Expected a sound study. {path} is damaged ({text}). Go back to a copy, or save what"
            f" is left with: sqlite3 {path} .recover"
        )
    if "readonly" in text or "unable to open" in text:
        return StoreError(
            f"Expected to write to {path} and its folder. SQLite says: {text}. Change the"
            " permissions, or copy the study elsewhere."
        )
    if "full" in text:
        return StoreError(
            f"Expected room on the disk of {path}. SQLite says: {text}. Make room and run the same"
            " command again: it goes on."
        )
    return StoreError(
        f"Expected to use the study {path}. SQLite says: {text}. Try again, or with a copy on a"
        " local disk."
    )
