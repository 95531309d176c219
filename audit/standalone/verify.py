"""Verify an export of an audit log: python3 verify.py --pubkey FILE [--anchor FILE]... [--proof FILE] [DIR]

Needs Python 3.11 and `cryptography`; shares no code with the software that wrote the export.
Exit 0 intact, 10 tampered, 11 incomplete, 12 cannot verify. It stops where the log is not what was
signed. Start at the end, at `verify`.
"""
import argparse, base64, json, re, sys
from collections import namedtuple
from datetime import datetime, timedelta
from functools import reduce
from hashlib import file_digest, sha256
from pathlib import Path
from types import SimpleNamespace
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

BAD, CANNOT, INCOMPLETE, INFO = LEVELS = "TAMPERED", "CANNOT VERIFY", "INCOMPLETE", "note"  # the worst first
ERRORS = (InvalidSignature, ValueError, KeyError, TypeError, AttributeError, RecursionError)
LONGEST, BATCH, EPOCHS, NEVER = 1 << 20, 65_536, 1000, float("inf")  # bytes of a line, events of a checkpoint
FIELDS = "at account_id class action target_kind target_id login client body".split()

def form(**keys): return re.compile("{" + ", ".join(f'"{key}": {value}' for key, value in keys.items()) + "}\n")

# What lines must be, to the byte: these keys in this order, with such values
INT, HEX, STRING = "(?:0|[1-9][0-9]{0,17})", '"[0-9a-f]{64}"', r'"(?:[ !#-\[\]-~]++|\\["\\bfnrt]|\\u[0-9a-f]{4})*+"'
LOG_ID, HASHES = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", rf"\[(?:{HEX}(?:, {HEX})*)?\]"
TIME, TEXTS = "[0-9TZ:.-]{27}", dict.fromkeys(FIELDS, STRING) | {"account_id": f"(?:null|{STRING})"}
LOG = form(format='"syncward-audit-export/1"', log_id=f'"{LOG_ID}"', first=INT, size=INT, checkpoint_size=INT,
           log_size=INT, software=STRING, frontier=HASHES, exported_at=f'"{TIME}"')
EVENT, MISSING = form(index=INT, seq=INT, xid=INT, **TEXTS, leaf=HEX), form(index=INT, missing="true")
CHECKPOINT = form(text=STRING, signatures=STRING, count=INT, last_xid=INT, last_seq=INT)
EPOCH = form(epoch=INT, size=INT, reason=STRING, lost_size=f"(?:null|{INT})", lost_root=f"(?:null|{HEX})")
NAME = form(id=STRING, kind=STRING, name=STRING, salt=HEX)
PROOF = form(format='"syncward-audit-proof/1"', event=form(**TEXTS).pattern[:-1], index=INT, size=INT, path=HASHES, note=STRING)
FILES = r"(log\.json|(epochs|checkpoints|names|ocsf)\.jsonl|hashes|verify\.py|SHA256SUMS|events/[0-9]{12}\.jsonl)"
POINT = re.compile(rf"syncward/audit/({LOG_ID})\n(0|[1-9][0-9]{{0,17}})\n([A-Za-z0-9+/]{{43}}=)\n"
                   rf"epoch ([1-9][0-9]{{0,9}})\ntime ({TIME})\n")
Point = namedtuple("Point", "text signatures log_id size root epoch time path")
found, keys, until = [], {}, {}  # (level, index, text); (name, hash) -> key, and the last size that it may sign

def say(level, text, index=NEVER): found.append((LEVELS.index(level), index, text))

def refuse(text): raise ValueError(text)

def lines(path):
    with path.open("rb") as file:
        while line := file.readline(LONGEST + 1):
            yield line if len(line) <= LONGEST else refuse(f"{path.name} has a line that is too long")

def read(line, *forms):
    return json.loads(line) if any(x.fullmatch(line.decode("ascii")) for x in forms) else refuse(f"no such line: {line[:80]}")

def read_key(line):
    name, hash_, raw = re.fullmatch(r"([^\s+]+)\+([0-9a-f]{8})\+([A-Za-z0-9+/]+={0,2})", line.strip()).groups()
    raw = base64.b64decode(raw, validate=True)
    if raw[:1] != b"\1" or sha256(name.encode() + b"\n" + raw).hexdigest()[:8] != hash_:
        refuse("a key is not of Ed25519, or its hash is not its own")
    return (name, bytes.fromhex(hash_)), Ed25519PublicKey.from_public_bytes(raw[1:])

def signers(text, signatures):
    """Return which of our keys signed; InvalidSignature if one is named that did not."""
    signed = set()
    for line in signatures.splitlines():
        name, raw = re.fullmatch(r"— ([^\s+]+) ([A-Za-z0-9+/]+={0,2})", line).groups()
        raw = base64.b64decode(raw, validate=True)
        if key := keys.get((name, raw[:4])):
            key.verify(raw[4:], text.encode())
            signed.add((name, raw[:4]))
    return signed

def trusted(signed, size): return any(size <= until.get(key, NEVER) for key in signed)  # not replaced by then

def parse_time(text): return datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ")

def parse(text, signatures):
    log_id, size, root, epoch, time = POINT.fullmatch(text).groups()
    return Point(text, signatures, log_id, int(size), base64.b64decode(root), int(epoch), parse_time(time), None)

def parse_note(note):
    text, _, signatures = note.rpartition("\n\n")
    return parse(text + "\n", signatures if signatures.endswith("\n") else refuse("a note is cut"))

def netstrings(*fields): return b"".join(b"%d:%b," % (len(field), field) for field in fields)

def leaf(event):
    fields = ((event[name] or "").encode("utf-8", "surrogatepass") for name in FIELDS)
    return sha256(b"\0" + netstrings(b"syncward/audit/v1", *fields)).digest()

def node(left, right): return sha256(b"\1" + left + right).digest()

def add(tree, size, hash_):  # `tree` holds the roots of full subtrees, the largest first (RFC 6962)
    size += 1
    while size % 2 == 0:
        hash_, size = node(tree.pop(), hash_), size // 2
    tree.append(hash_)

def root_of(tree): return reduce(lambda right, left: node(left, right), reversed(tree))

def check_proof(said):
    point, hash_, at = parse_note(said["note"]), leaf(said["event"]), said["index"]
    last = point.size - 1
    for other in map(bytes.fromhex, said["path"]):  # RFC 9162, section 2.1.3.2
        hash_ = node(other, hash_) if at % 2 or at == last else node(hash_, other)
        while at == last and at and not at % 2:
            at, last = at // 2, last // 2
        at, last = at // 2, last // 2
    if said["size"] != point.size or said["index"] >= point.size or last or hash_ != point.root:
        say(BAD, "the event is not what was sealed", said["index"])
    signers(point.text, point.signatures) or say(CANNOT, "the checkpoint is signed by a key that is not trusted")

def check_files(here):
    """Nothing but the files of an export may be there, each as SHA256SUMS has it."""
    there, named = set(), {}
    for path in here.rglob("*"):
        name = str(path.relative_to(here))
        right = path.is_file() if re.fullmatch(FILES, name) else path.is_dir() and name in ("events", "__pycache__")
        if not name.startswith("__pycache__/"):
            there |= {name} if right and not path.is_symlink() else refuse(f"{name} is no file of an export")
    for line in lines(here / "SHA256SUMS") if "SHA256SUMS" in there else ():
        digest, name = re.fullmatch(r"([0-9a-f]{64})  ([!-~]+)\n", line.decode("ascii")).groups()
        named[name] = digest if name not in named else refuse("a sum is there twice")
    there -= {"events", "__pycache__"}
    for name in {"SHA256SUMS"} - there or sorted((there | named.keys()) - {"SHA256SUMS"}):
        if name not in there:
            say(INCOMPLETE, f"{name} is missing")
        elif file_digest((here / name).open("rb"), "sha256").hexdigest() != named.get(name):
            say(BAD, f"{name} is not the file that was exported")

def read_log(here):
    log = read((here / "log.json").open("rb").read(LONGEST), LOG)
    log["exported_at"] = parse_time(log["exported_at"])
    whole = log["first"] < log["size"] <= log["checkpoint_size"] and len(log["frontier"]) == log["first"].bit_count()
    return log if whole else refuse("log.json names a range that cannot be")

def check_names(here):
    for said in (read(line, NAME) for line in lines(here / "names.jsonl")):
        fields = bytes.fromhex(said["salt"]), said["kind"].encode(), said["name"].encode()
        said["id"] == sha256(netstrings(b"syncward/principal/v1", *fields)).hexdigest()[:32] or refuse("not its name")

def events(here, expected):
    """Yield events in their order, and at last one of an index that never comes."""
    for line in (line for path in sorted((here / "events").glob("*.jsonl")) for line in lines(path)):
        event = read(line, EVENT, MISSING)
        expected = event["index"] + 1 if event["index"] >= expected else refuse("an event is twice or out of order")
        yield event
    yield {"index": NEVER}

def walk(here, log, epochs, anchored, w):
    """Recompute the log. `w`: where this stands, what is proven by a signature, and what is to be judged."""
    tree, pending, rotated, before = [bytes.fromhex(x) for x in log["frontier"]], [], [], max(w.size - 1, 0)
    source, hashes, end = events(here, w.size), (here / "hashes").open("rb"), w.size + (here / "hashes").stat().st_size // 32
    event = next(source)
    for said in (read(line, CHECKPOINT) for line in lines(here / "checkpoints.jsonl")):
        point, w.at = parse(said["text"], said["signatures"]), w.good
        if not before < point.size <= min(log["size"], before + (BATCH if w.points or not w.size else 1)):
            refuse(f"a checkpoint of {point.size} events behind that of {before}")
        if point.size > end:  # nothing costs more than there is
            return say(INCOMPLETE, "hashes are missing", end)
        begun = [e["epoch"] for e in epochs if e["size"] < point.size][-1:]  # the first one may be where a part begins
        if point.size > log["first"] and (before + said["count"], begun) != (point.size, [point.epoch]):
            refuse("a checkpoint is missing, or of an unknown epoch")
        while w.size < point.size:  # the tree takes what was sealed, or what is here if nobody knows that
            here_, w.at, sealed = event if event["index"] == w.size else {}, w.size, hashes.read(32)
            made = leaf(here_) if "leaf" in here_ else None
            sealed = sealed if any(sealed) else say(INCOMPLETE, "its sealed hash is missing", w.size)
            if made is None:
                w.gone.append((BAD if here_ else INCOMPLETE, w.size))
                w.broken = w.broken or not sealed
            elif here_["leaf"] != made.hex() or sealed not in (None, made):
                refuse("the event is not what was sealed, or its hash is not")
            elif here_["action"] in ("signer.rotated", "audit.pruned", "audit.epoch_started"):
                pending.append((w.size, here_["action"], json.loads(here_["body"])["detail"]))
            add(tree, w.size, sealed or made or bytes(32))
            w.size, event = w.size + 1, next(source) if here_ else event
            w.roots |= {w.size: root_of(tree)} if w.size in anchored and not w.broken else {}
        w.at, before = w.good, point.size
        signed = signers(point.text, point.signatures)
        if point.log_id != log["log_id"] or signed and not trusted(signed, point.size):
            refuse("a checkpoint is of another log, or of a key that was replaced before")
        w.broken or point.root == root_of(tree) or refuse(f"up to {point.size - 1} this is not what was signed")
        signed and w.unknown and say(INFO, f"{w.unknown} checkpoints before {point.size} are of keys that are not known here")
        w.unknown = 0 if signed else w.unknown + 1
        w.points.append(point)
        w.trusted = w.trusted or bool(signed)
        if signed and not w.broken:
            w.good = point.size
            for old, new in rotated:
                new in signed and old not in signed and until.setdefault(old, point.size)
            w.said += [x for x in pending if believe(log, rotated, *x)]
            pending = []
    w.at, w.pending = w.size, pending
    event["index"] == NEVER and not hashes.read(1) or refuse("the log goes on after its last checkpoint")

def believe(log, rotated, index, action, said):
    """Say whether a trusted key signed what the sealer says in the log; trust a key that it names."""
    try:
        rest = json.dumps({k: v for k, v in said.items() if k != "signature"}, sort_keys=True, separators=(",", ":"))
        signed = signers(f"syncward/statement/{log['log_id']}\n{action}\n{rest}\n", said["signature"] or refuse("not signed"))
        if not trusted(signed, index + 1):
            return say(BAD if signed else CANNOT, f"{action} is signed by a key that is not trusted", index)
        if action == "signer.rotated":
            name, key = read_key(said["after"])
            rotated.append((read_key(said["before"])[0], name))
            keys.setdefault(name, key)
        return True
    except ERRORS:
        say(BAD, f"{action} was not signed by the sealer", index)

def judge(log, epochs, anchored, w):
    """Judge the end, missing events by records of prunes, epochs by what the sealer said, and anchors."""
    kept, also, size = 0, set(), w.size
    if not w.trusted or w.unknown:
        say(BAD if w.trusted else CANNOT, "signed by a key that is not trusted", w.good)
    size < log["size"] and say(INCOMPLETE, "checkpoints are missing", size)
    log["log_size"] == log["checkpoint_size"] or say(BAD, "the end was cut off", min(log["log_size"], size))
    whole = log["size"] == log["checkpoint_size"] or say(INFO, f"ends at {log['size']} of {log['checkpoint_size']}")
    if whole and w.points and log["exported_at"] - w.points[-1].time > timedelta(minutes=5):
        say(INCOMPLETE, "no sealer ran, or the end was cut off: compare with an anchor")
    for index, was in ((index, said) for index, action, said in w.said if action == "audit.pruned"):
        named = {int(i) for i in was["also"].split(",") if i}
        root = [p.root.hex() for p in w.points if p.size == was["size"] <= index]
        right = root == [was["root"]] and 0 <= was["first_kept"] <= was["size"] > max(named, default=-1)
        kept, also = (max(kept, was["first_kept"]), also | named) if right else (kept, also)
        say(INFO if right else BAD, f"record of a prune: {was}", index)
    [say(level, "the event is missing", index) for level, index in w.gone if index >= kept and index not in also]
    rows = {e["epoch"]: [e[k] for k in ("size", "reason", "lost_size", "lost_root")] for e in epochs}
    begun = [(said["epoch"], index, [said.get(k) for k in ("size", "why", "lost_size", "lost_root")])
             for index, action, said in w.said if action == "audit.epoch_started"]
    for epoch, index, claim in begun:
        say(INFO if rows.get(epoch) == claim else BAD, f"epoch {epoch} began: {claim}", index)
    for epoch, at in ((epoch, rows[epoch][0]) for epoch in rows.keys() - {x[0] for x in begun} - {1}):
        if log["first"] <= at and (at < size or at > size and whole) and not w.pending and not any(at <= i <= at + 256 for _, i in w.gone):
            say(BAD, f"the sealer never said that epoch {epoch} began", at)
    judge_anchors(log, anchored, sorted(begun), whole, w)

def judge_anchors(log, anchored, begun, whole, w):
    seen, good, idle = {}, [0], {point.path for points in anchored.values() for point in points}
    for point in sorted(sum(anchored.values(), []), key=lambda p: (p.epoch, p.size)):
        try:
            trusted(signers(point.text, point.signatures), point.size) and point.log_id == log["log_id"] or refuse("it")
        except ERRORS:
            say(INFO, f"an anchored checkpoint of {point.size} events is not counted: not of a trusted key")
            continue
        idle.discard(point.path)
        loss = next((c for n, _, c in begun if n > point.epoch and c[2] and point.size > c[0]), None)
        right = (point.size <= w.size or not whole) and w.roots.get(point.size, point.root) == point.root
        if loss:
            right = point.size < loss[2] or [point.size, point.root.hex()] == loss[2:]
        if seen.setdefault((point.epoch, point.size), point.root) == point.root and right:
            good.append(point.size)
        else:
            least = max(x for x in good if x < point.size) if point.size <= w.size else w.size
            say(BAD, f"an anchor holds another history of {point.size} events: a fork, or cut off",
                min((i for level, i, _ in found if not level and least <= i < point.size), default=least))
    [say(INCOMPLETE, f"{path.name} holds nothing of this log that a trusted key signed") for path in idle]

def read_anchor(path, anchored):
    held = 0
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        try:
            for note in re.findall(r"syncward-checkpoint ([A-Za-z0-9+/]+={0,2})", line):
                point = parse_note(base64.b64decode(note).decode())._replace(path=path)
                anchored.setdefault(point.size, []).append(point)
                held += 1
        except ERRORS:
            say(INFO, f"{path.name} has a line that is cut")
    held or say(INCOMPLETE, f"{path.name} holds no checkpoint: it proves nothing")

def verify(asked):
    """Yield what it means if that which is read next is not whole."""
    yield CANNOT
    listed = [x for x in asked.pubkey.read_text("utf-8").splitlines() if x.strip() and not x.startswith("#")]
    keys.update([read_key(x) for x in listed or refuse("no public key")])
    if asked.proof:
        raw = asked.proof.open("rb").read(LONGEST) if asked.proof.is_file() else b""
        yield BAD if raw.startswith(b'{"format": "syncward-audit-proof/1", ') else CANNOT
        return check_proof(read(raw, PROOF))
    anchored, here = {}, asked.directory
    [read_anchor(path, anchored) for path in asked.anchor]
    yield BAD
    check_files(here)
    yield CANNOT
    log = read_log(here)
    yield BAD
    [(here / name).stat() for name in ("checkpoints.jsonl", "epochs.jsonl", "hashes")]
    (here / "names.jsonl").exists() and check_names(here)
    epochs = [read(line, EPOCH) for line in lines(here / "epochs.jsonl")]
    len(epochs) <= EPOCHS or refuse("so many epochs")
    w = SimpleNamespace(size=log["first"], good=log["first"], at=NEVER, trusted=False, unknown=0, broken=False,
                        points=[], gone=[], said=[], pending=[], roots={})
    try:
        walk(here, log, epochs, anchored, w)
    except ERRORS as error:
        return say(BAD, f"{error or 'a signature is forged'}; nothing that follows was looked at", w.at)
    judge(log, epochs, anchored, w)

options, level = argparse.ArgumentParser(description=__doc__), CANNOT
for word, more in {"--pubkey": {"required": True}, "--anchor": {"action": "append", "default": []}, "--proof": {},
                   "directory": {"nargs": "?", "default": Path(__file__).resolve().parent}}.items():
    options.add_argument(word, type=Path, **more)
try:
    for level in verify(options.parse_args()):
        pass
except OSError as error:
    say(CANNOT if level == CANNOT else INCOMPLETE, f"{error.filename} cannot be read")
except ERRORS as error:
    say(level, f"this is not whole: {error or type(error).__name__}")
for level, index, text in sorted(found)[:40]:
    print(re.sub(r"[^ -~]", "?", f"{LEVELS[level]}{'' if index == NEVER else f' at index {index}'}: {text}"))
worst = min(found)[0] if found else 3
print(f"{len(found)} findings: {'intact' if worst == 3 else LEVELS[worst].lower()}")
sys.exit((10, 12, 11, 0)[worst])
