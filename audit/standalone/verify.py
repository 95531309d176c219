"""Verify an export of an audit log: python3 verify.py --pubkey FILE [--anchor FILE]... [--proof FILE] [DIR]

Needs Python 3.11, `cryptography` and log_format.py beside it; shares no code with what wrote the export. Exit 0
intact, 10 tampered, 11 incomplete, 12 cannot verify. It stops where the log is not what was signed. Start at `main`.
"""
import argparse, json, re, runpy, sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
# No `import`: it would run a `log_format` that was compiled, or a directory of that name, if one lies beside it
form = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().with_name("log_format.py"))))
ERRORS, NEVER, demand = form.ERRORS, form.NEVER, form.demand

BAD, CANNOT, INCOMPLETE, INFO = LEVELS = "TAMPERED", "CANNOT VERIFY", "INCOMPLETE", "note"  # the worst first
SKEW = timedelta(minutes=5)  # the newest checkpoint is younger, and clocks do not differ by more
found = []  # (place in LEVELS, index, text)

def say(level, text, index=NEVER, unless=False):
    """What is said is kept, and the worst decides; `demand` ends the reading, too."""
    if not unless:
        found.append((LEVELS.index(level), index, text))

def check_proof(said, keys):
    """The path must lead from the event to a root that a trusted key signed."""
    point, index = form.parse_note(said["note"]), said["index"]
    root = form.root_from(form.leaf(said["event"]), index, point.size, map(bytes.fromhex, said["path"]))
    sealed = index < point.size == said["size"] and root == point.root
    say(BAD, "the event is not what was sealed", index, unless=sealed)
    signed = keys.signers(point.text, point.signatures)
    say(CANNOT, "signed by a key that is not trusted", unless=signed)

class Walk:
    """Recomputes a log from front to back, and keeps what is judged at its end."""

    def __init__(self, here, log, anchored, keys):
        self.here, self.log, self.keys = here, log, keys
        self.anchored = {point.size for _, points in anchored for point in points}
        self.size = self.good = self.at = log["first"]  # looked at, proven by a signature, looked at now
        self.tree = [bytes.fromhex(hash_) for hash_ in log["frontier"]]
        self.broken = self.trusted = False  # a hash is not known, so no root is; a trusted key signed
        self.times, self.roots, self.missing = [], {}, []
        self.heard = []  # statements that are not proven yet
        self.said = {"signer.rotated": [], "audit.pruned": [], "audit.epoch_started": []}  # proven statements
        self.epochs = list(form.read_lines(here / "epochs.jsonl", form.EPOCH))
        self.hashes, self.events = (here / "hashes").open("rb"), form.read_events(here, self.size)
        self.end = self.size + (here / "hashes").stat().st_size // 32

    def run(self):
        """Each checkpoint must go on from the one before, and nothing may come after the last."""
        self.event, before = next(self.events), max(self.size - 1, 0)  # a part begins with its own checkpoint
        demand(len(self.epochs) <= form.MOST_EPOCHS, "so many epochs")
        for said in form.read_lines(self.here / "checkpoints.jsonl", form.CHECKPOINT):
            self.at, point = self.good, form.parse_checkpoint(said["text"], said["signatures"])
            most = form.LARGEST_BATCH if self.times or not self.size else 1
            demand(before < point.size <= min(self.log["size"], before + most), f"{point.size} cannot follow {before}")
            if point.size > self.end:  # nothing costs more than there is
                return say(INCOMPLETE, "hashes are missing", self.end)
            begun = [epoch["epoch"] for epoch in self.epochs if epoch["size"] < point.size]
            whole = point.size == before + said["count"] and begun[-1:] == [point.epoch]
            demand(whole or point.size == self.log["first"], "a checkpoint is missing, or of an unknown epoch")
            while self.size < point.size:
                self.take()
            self.at, before = self.good, point.size
            self.compare(point)
        self.at = self.size
        demand(self.event["index"] == NEVER and not self.hashes.read(1), "the log goes on after its last checkpoint")

    def take(self):
        """An event must hash to what was sealed. The tree takes that, or the event if it is not known."""
        event, self.at = self.event if self.event["index"] == self.size else {}, self.size
        sealed, made = self.hashes.read(32), form.leaf(event) if "leaf" in event else None
        known = any(sealed)
        say(INCOMPLETE, "its sealed hash is missing", self.size, unless=known)
        if made:
            demand(event["leaf"] == made.hex() and (sealed == made or not known), "the event is not what was sealed")
            if event["action"] in self.said:
                self.heard.append((self.size, event["action"], json.loads(event["body"])["detail"]))
        else:
            self.missing.append((BAD if event else INCOMPLETE, self.size))
            self.broken = self.broken or not known
        self.size += 1
        form.add(self.tree, self.size, sealed if known else made or bytes(32))
        if self.size in self.anchored and not self.broken:
            self.roots[self.size] = form.root_of(self.tree)
        self.event = next(self.events) if event else self.event

    def compare(self, point):
        """A checkpoint must be of this log, and of its tree; a trusted one proves what it covers."""
        signed = self.keys.signers(point.text, point.signatures)
        demand(point.log_id == self.log["log_id"], "a checkpoint is of another log")
        demand(not signed or self.keys.trusts(signed, point.size), "the key of a checkpoint was replaced before")
        demand(self.broken or point.root == form.root_of(self.tree), "what comes before is not what was signed")
        self.times.append(point.time)
        self.roots[point.size] = point.root
        self.trusted = self.trusted or bool(signed)
        if signed and not self.broken:
            self.good = point.size
            self.keys.replace(signed, point.size)
            while self.heard:
                self.believe(*self.heard.pop(0))

    def believe(self, index, action, said):
        """What the sealer says in the log must be signed by a trusted key, and then counts."""
        try:
            demand(said["signature"], "not signed")
            signed = self.keys.signers(form.statement(self.log["log_id"], action, said), said["signature"])
            if not self.keys.trusts(signed, index + 1):
                return say(BAD if signed else CANNOT, f"{action} is signed by a key that is not trusted", index)
            if action == "signer.rotated":
                self.keys.rotate(said)
            self.said[action].append((index, said))
        except ERRORS:
            say(BAD, f"{action} was not signed by the sealer", index)

def judge_end(log, whole, w):
    """The log must end where it says, signed by a trusted key just before it was exported."""
    proven = w.trusted and w.good == w.size
    say(BAD if w.trusted else CANNOT, "signed by a key that is not trusted", w.good, unless=proven)
    say(INCOMPLETE, "checkpoints are missing", w.size, unless=w.size == log["size"])
    cut = log["log_size"] != log["checkpoint_size"]
    say(BAD, "the end was cut off", min(log["log_size"], w.size), unless=not cut)
    say(INFO, f"ends at {log['size']} of {log['checkpoint_size']}", unless=whole)
    ages = [log["exported_at"] - time for time in w.times] or [SKEW]
    say(INCOMPLETE, "the end is old: no sealer ran, or it was cut off", unless=not whole or ages[-1] <= SKEW)
    say(INCOMPLETE, "signed after it was exported: a clock is wrong", unless=min(ages) >= -SKEW)

def judge_missing(w):
    """An event may be missing if a record of a prune names it, and the root that was then."""
    kept, also = 0, set()
    for index, was in w.said["audit.pruned"]:
        named = {int(i) for i in was["also"].split(",") if i}
        in_range = 0 <= was["first_kept"] <= was["size"] <= index and max(named, default=-1) < was["size"]
        right = in_range and w.roots.get(was["size"], b"").hex() == was["root"]
        say(INFO if right else BAD, f"record of a prune: {was}", index)
        if right:
            kept, also = max(kept, was["first_kept"]), also | named
    for level, index in w.missing:
        say(level, "the event is missing", index, unless=index < kept or index in also)

def judge_epochs(log, whole, w):
    """The sealer must have said of each epoch after the first why it began. Return what it said."""
    rows = {row["epoch"]: [row[key] for key in ("size", "reason", "lost_size", "lost_root")] for row in w.epochs}
    begun = [(said["epoch"], index, [said.get(key) for key in ("size", "why", "lost_size", "lost_root")])
             for index, said in w.said["audit.epoch_started"]]
    for epoch, index, claim in begun:
        say(INFO if rows.get(epoch) == claim else BAD, f"epoch {epoch} began: {claim}", index)
    for epoch in rows.keys() - {epoch for epoch, _, _ in begun} - {1}:
        at = rows[epoch][0]
        pruned = any(at <= index <= at + 256 for _, index in w.missing)
        waits = w.heard or at == w.size or at > w.size and not whole
        say(BAD, f"the sealer never said that epoch {epoch} began", at, unless=at < log["first"] or pruned or waits)
    return begun

def judge_anchors(log, anchored, whole, begun, w):
    """What left the database must be in the log, unless a restore lost it as the sealer says."""
    seen, good, silent, newest = {}, [0], {path for path, _ in anchored}, 0
    counted = [(path, point) for path, points in anchored for point in points if w.keys.counts(point, log["log_id"])]
    for path, point in sorted(counted, key=lambda one: (one[1].epoch, one[1].size)):
        size, root = point.size, point.root
        silent.discard(path)
        loss = [claim for epoch, _, claim in begun if epoch > point.epoch and claim[2] and size > claim[0]]
        newer = whole and not loss and size > w.size and point.time > log["exported_at"]
        newest = max(newest, size) if newer else newest
        right = newer or (size <= w.size or not whole) and w.roots.get(size, root) == root
        if loss:
            right = size < loss[0][2] or [size, root.hex()] == loss[0][2:]
        if right and seen.setdefault((point.epoch, size), root) == root:
            good.append(size)
        else:
            least = max(x for x in good if x < size) if size <= w.size else w.size
            say(BAD, f"an anchor holds another history of {size} events: a fork, or cut off", least)
    text = f"the log went on after this export was made, to {newest} events: ask for a newer one"
    say(INCOMPLETE, text, w.size, unless=not newest)
    for path in silent:
        say(INCOMPLETE, f"{path.name} holds no checkpoint of this log that a trusted key signed: it proves nothing")

def verify(asked):
    """Read what was asked for, and say what is wrong."""
    keys, walk = form.Keys(asked.pubkey), None
    try:
        if asked.proof:
            return check_proof(form.read_proof(asked.proof), keys)
        anchored = [(path, list(form.notes_in(path))) for path in asked.anchor]
        for name, there in form.check_files(asked.directory):
            say(BAD if there else INCOMPLETE, f"{name} is {'not the file that was exported' if there else 'missing'}")
        form.check_names(asked.directory / "names.jsonl")
        log = form.read_log(asked.directory / "log.json")
        walk = Walk(asked.directory, log, anchored, keys)
        walk.run()
        whole = log["size"] == log["checkpoint_size"]
        judge_end(log, whole, walk)
        judge_missing(walk)
        judge_anchors(log, anchored, whole, judge_epochs(log, whole, walk), walk)
    except OSError as error:
        say(INCOMPLETE, f"{error.filename} cannot be read")
    except ERRORS as error:
        say(BAD, f"not whole: {error or type(error).__name__}; nothing more was read", walk.at if walk else NEVER)

def main():
    """Print what is wrong, the worst first, and exit with what it means."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--pubkey", type=Path, required=True)
    options.add_argument("--anchor", type=Path, action="append", default=[])
    options.add_argument("--proof", type=Path)
    options.add_argument("directory", type=Path, nargs="?", default=Path(__file__).resolve().parent)
    try:
        verify(options.parse_args())
    except form.Unknown as error:
        say(CANNOT, str(error))
    for level, index, text in sorted(found)[:40]:
        place = "" if index == NEVER else f" at index {index}"
        print(re.sub(r"[^ -~]", "?", f"{LEVELS[level]}{place}: {text}"))
    worst = min(found, default=(3,))[0]
    print(f"{len(found)} findings: {'intact' if worst == 3 else LEVELS[worst].lower()}")
    sys.exit((10, 12, 11, 0)[worst])

main()
