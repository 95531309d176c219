"""Verify an export of an audit log: python3 verify.py --pubkey FILE [--anchor FILE]... [--proof FILE] [DIR]

Needs Python 3.11 and `cryptography`; shares no code with the software that wrote the export.
Exit 0 intact, 10 tampered, 11 incomplete, 12 cannot verify.
"""
import argparse, base64, json, re, sys
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

BAD, CANNOT, INCOMPLETE, INFO = LEVELS = "TAMPERED", "CANNOT VERIFY", "INCOMPLETE", "note"  # the worst first
FIELDS = "at account_id class action target_kind target_id login client body".split()
TEXT = re.compile(r"syncward/audit/([0-9a-f-]{36})\n(0|[1-9]\d{0,18})\n([A-Za-z0-9+/]{43}=)\n"
                  r"epoch ([1-9]\d{0,9})\ntime (\S{27})\n")
ERRORS = (InvalidSignature, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)
NEVER, found, keys = float("inf"), [], {}  # (level, index, text); (name, hash) -> key

def say(level, text, index=NEVER):
    found.append((LEVELS.index(level), index, text))

def trust(line):
    name, hash_, key = line.strip().split("+", 2)
    keys[name, bytes.fromhex(hash_)] = Ed25519PublicKey.from_public_bytes(base64.b64decode(key)[1:])

def signed(text, signatures):
    """Say whether a trusted key signed; InvalidSignature if one is named that did not."""
    known = False
    for line in signatures.splitlines():
        name, raw = re.fullmatch(r"— ([^\s+]+) ([A-Za-z0-9+/]+=*)", line).groups()
        if key := keys.get((name, base64.b64decode(raw)[:4])):
            known = key.verify(base64.b64decode(raw)[4:], text.encode()) is None
    return known

def parse(text, signatures):
    log, size, root, epoch, time = TEXT.fullmatch(text).groups()
    return text, signatures, log, int(size), base64.b64decode(root), int(epoch), datetime.fromisoformat(time)

def parse_note(note):
    return parse(note.rpartition("\n\n")[0] + "\n", note.rpartition("\n\n")[2])

def leaf(event):
    raw = [b"syncward/audit/v1", *((event[name] or "").encode("utf-8", "surrogatepass") for name in FIELDS)]
    return sha256(b"\0" + b"".join(b"%d:%b," % (len(r), r) for r in raw)).digest()

def node(left, right):
    return sha256(b"\1" + left + right).digest()

def add(tree, size, hash_):  # `tree` holds the roots of full subtrees, the largest first (RFC 6962)
    while size % 2 == 0:
        hash_, size = node(tree.pop(), hash_), size // 2
    tree.append(hash_)

def root_of(tree):
    root = tree[-1] if tree else sha256(b"").digest()
    for hash_ in tree[-2::-1]:
        root = node(hash_, root)
    return root

def events(directory, expected):
    """Yield (index, event), None for an event that is said to be missing; at last an end."""
    for line in (line for path in sorted(directory.glob("*.jsonl")) for line in path.open("rb")):
        try:
            said = json.loads(line)
            index, event = said["index"] + 0, said.get("missing") is not True and {**said, "made": leaf(said)} or None
        except ERRORS:
            index, event = say(BAD, "a line of events is none", expected) or expected, None
        expected = index + 1
        yield index, event
    yield NEVER, None

def check_sums(here):
    there = {str(p.relative_to(here)): sha256(p.read_bytes()).hexdigest() for p in here.rglob("*") if p.is_file()}
    named = dict(x.partition("  ")[::-2] for x in (here / "SHA256SUMS").read_text("utf-8", "replace").splitlines())
    for name in (there.keys() | named.keys()) - {"SHA256SUMS"}:
        if named.get(name) != there.get(name) and "__pycache__" not in name:
            say(BAD if name in there else INCOMPLETE, f"{name} is not the file that was exported")

def check_proof(said):
    (text, signatures, _, size, root, _, _), index = parse_note(said["note"]), said["index"]
    hash_, at, last = leaf(said["event"]), index, size - 1
    if (said["size"], said["event"]["index"], said["event"]["leaf"]) != (size, index, hash_.hex()):
        say(BAD, "the proof contradicts itself", index)
    for other in map(bytes.fromhex, said["path"]):
        hash_ = node(other, hash_) if at % 2 or at == last else node(hash_, other)
        while at == last and at and not at % 2:
            at, last = at // 2, last // 2
        at, last = at // 2, last // 2
    (type(index) is int and 0 <= index < size and last == 0 and hash_ == root) or say(BAD, "the event is not what was sealed", index)
    signed(text, signatures) or say(CANNOT, "the checkpoint is signed by a key that is not trusted")

def believe(log_id, pending, said):
    """Keep what the sealer says in the log if a trusted key signed it; trust a key that it names."""
    for index, action, was in pending:
        text = json.dumps({k: v for k, v in was.items() if k != "signature"}, sort_keys=True, separators=(",", ":"))
        try:
            if not signed(f"syncward/statement/{log_id}\n{action}\n{text}\n", was["signature"]):
                raise ValueError
            trust(was["after"]) if action == "signer.rotated" else said.append((index, action, was))
        except ERRORS:
            say(BAD, f"{action} was not signed by the sealer", index)

def walk(here, log, points, epochs, anchored, unknown=0, trusted=0, broken=0):
    """Recompute the log; return what remains to be judged. `points`: (count, *parsed checkpoint)."""
    hashes, source, gone, said, pending, roots = (here / "hashes").open("rb"), events(here / "events", log["first"]), [], [], [], {}
    tree, size, good, held = [bytes.fromhex(h) for h in log["frontier"]], log["first"], log["first"], next(source)
    for count, text, signatures, log_id, upto, root, epoch, _ in points:
        if upto != log["first"] and not upto - count == size < upto:  # that one is where a part begins
            say(BAD, "a checkpoint does not follow the one before", size)
        doubts = 0
        while size < upto:
            while held[0] < size:
                held = say(BAD, "an event is there twice, or out of order", held[0]) or next(source)
            there, event, hash_ = held[0] == size, held[1] if held[0] == size else None, hashes.read(32)
            held = next(source) if there else held
            if len(hash_) < 32 or not any(hash_):
                hash_ = say(INCOMPLETE, "a sealed hash is missing", size)
            if event is None:
                gone.append((BAD if there else INCOMPLETE, size))
                broken = broken or not hash_
            else:
                if event["leaf"] != event["made"].hex() or hash_ not in (None, event["made"]):
                    doubts += 1
                    say(BAD, "the event is not what was sealed, or its hash is not", size)
                if event["action"] in ("signer.rotated", "audit.pruned", "audit.epoch_started"):
                    pending.append((size, event["action"], json.loads(event["body"])["detail"]))
            size += 1
            add(tree, size, hash_ or (event and event["made"]) or bytes(32))
            roots |= {size: root_of(tree)} if size in anchored else {}
        [e["epoch"] for e in epochs if e["size"] < upto][-1:] == [epoch] or say(BAD, "of an unknown epoch", good)
        try:
            ours = log_id == log["log_id"] and signed(text, signatures)
            unknown, trusted = (0, trusted + 1) if ours else (unknown + 1, trusted)
        except ERRORS:
            ours = say(BAD, f"the checkpoint of {upto} events is not what its key signed", good)
        if not broken and root != root_of(tree):
            broken = doubts or say(BAD, f"events {good} to {upto - 1} do not lead to what was signed", good) or True
        if ours and not broken:
            good, pending = upto, believe(log_id, pending, said) or []
    (unknown or not trusted) and say(BAD if trusted else CANNOT, "signed by a key that is not trusted", good)
    whole = log["size"] == log["checkpoint_size"]
    size < log["size"] and say(INCOMPLETE, "checkpoints are missing", size)
    (held[0] < NEVER or whole and hashes.read(1)) and say(BAD, "the log goes on after its last checkpoint", size)
    log["log_size"] == log["checkpoint_size"] or say(BAD, "the end was cut off", min(log["log_size"], size))
    if whole and points and datetime.fromisoformat(log["exported_at"]) - points[-1][7] > timedelta(minutes=5):
        say(INCOMPLETE, "no sealer ran, or the end was cut off: compare with an anchor")
    return size, gone, said, roots

def judge(log, points, epochs, anchored, size, gone, said, roots):
    """Judge missing events by records of prunes, epochs by what the sealer said, and what anchors hold."""
    kept, also = 0, set()
    for index, was in ((i, detail) for i, action, detail in said if action == "audit.pruned"):
        named = {int(i) for i in was["also"].split(",") if i}
        roots_then = [p[5].hex() for p in points if p[4] == was["size"] <= index]
        right = roots_then == [was["root"]] and 0 <= was["first_kept"] <= was["size"] > max(named, default=-1)
        kept, also = (max(kept, was["first_kept"]), also | named) if right else (kept, also)
        say(INFO if right else BAD, f"record of a prune: {was}", index)
    [say(level, "the event is missing", i) for level, i in gone if i >= kept and i not in also]
    begun = {d["epoch"]: (i, [d.get(k) for k in ("size", "why", "lost_size", "lost_root")])
             for i, action, d in said if action == "audit.epoch_started"}
    rows = {e["epoch"]: [e[k] for k in ("size", "reason", "lost_size", "lost_root")] for e in epochs}
    for epoch, (index, claim) in begun.items():
        say(INFO if rows.get(epoch) == claim else BAD, f"epoch {epoch} began: {claim}", index)
    for epoch in rows.keys() - begun.keys() - {1}:
        if max(log["first"], kept) <= rows[epoch][0] < size:
            say(BAD, f"the sealer never said that epoch {epoch} began", rows[epoch][0])
    seen, good, idle = {}, [0], {p[7] for held in anchored.values() for p in held}
    for text, signatures, log_id, upto, root, epoch, _, path in sorted(sum(anchored.values(), []), key=lambda p: p[5:2:-2]):
        try:
            if log_id != log["log_id"] or not signed(text, signatures):
                raise ValueError
        except ERRORS:
            say(INFO, f"an anchored checkpoint of {upto} events is not counted: not of a trusted key")
            continue
        idle.discard(path)
        loss = next((c for n, (_, c) in sorted(begun.items()) if n > epoch and c[2] and upto > c[0]), None)
        right = (upto <= size or log["size"] < log["checkpoint_size"]) and roots.get(upto, root) == root
        if loss:
            right = upto < loss[2] or [upto, root.hex()] == loss[2:]
        if seen.setdefault((epoch, upto), root) == root and right:
            good.append(upto)
        else:
            least = max(x for x in good if x < upto) if upto <= size else size
            say(BAD, f"an anchor holds another history of {upto} events: a fork, or cut off",
                min((i for level, i, _ in found if not level and least <= i < upto), default=least))
    [say(INCOMPLETE, f"{x.name} holds nothing of this log that a trusted key signed: it proves nothing") for x in idle]

options, anchored, known = argparse.ArgumentParser(description=__doc__), {}, False
for word, more in {"--pubkey": {"required": True}, "--anchor": {"action": "append", "default": []}, "--proof": {},
                   "directory": {"nargs": "?", "default": Path(__file__).resolve().parent}}.items():
    options.add_argument(word, type=Path, **more)
here = (asked := options.parse_args()).directory
try:
    [trust(x) for x in asked.pubkey.read_text("utf-8").splitlines() if x.strip() and not x.startswith("#")]
    log = json.loads((asked.proof or here / "log.json").read_bytes())
    known = log["format"] == ("syncward-audit-proof/1" if asked.proof else "syncward-audit-export/1")
    for path in asked.anchor:
        notes = re.findall(r"syncward-checkpoint ([A-Za-z0-9+/]+={0,2})", path.read_text("utf-8", "replace"))
        notes or say(INCOMPLETE, f"{path.name} holds no checkpoint: it proves nothing")
        for one in notes:
            try:
                point = (*parse_note(base64.b64decode(one).decode()), path)
                anchored.setdefault(point[3], []).append(point)
            except ERRORS:
                say(INFO, "an anchor has a line that is cut")
    if known and asked.proof:
        check_proof(log)
    elif known:
        epochs, points = ([json.loads(x) for x in (here / name).open("rb")] for name in ("epochs.jsonl", "checkpoints.jsonl"))
        points = [(p["count"], *parse(p["text"], p["signatures"])) for p in points]
        judge(log, points, epochs, anchored, *walk(here, log, points, epochs, anchored))
except OSError as error:
    say(INCOMPLETE, f"{error.filename} cannot be read")
except ERRORS as error:
    say(BAD if known else CANNOT, f"a file is not whole: {type(error).__name__}")
try:
    asked.proof or check_sums(here)
except (OSError, *ERRORS):
    say(INCOMPLETE, "SHA256SUMS cannot be read")
known or say(CANNOT, "no public key, or no known format")
for level, index, text in sorted(found)[:40]:
    print(re.sub(r"[^ -~]", "?", f"{LEVELS[level]}{'' if index == NEVER else f' at index {index}'}: {text}"))
worst = min(found)[0] if found else 3
print(f"{len(found)} findings: {'intact' if worst == 3 else LEVELS[worst].lower()}")
sys.exit((10, 12, 11, 0)[worst])
