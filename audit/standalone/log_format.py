"""How a sealed log, its signatures and its exports are written. `verify.py` says what must be true of them.

Nothing here judges: what is not as it must be raises one of ERRORS.
"""
import base64, json, re
from collections import namedtuple
from contextlib import suppress
from datetime import datetime
from functools import reduce
from hashlib import file_digest, sha256
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

ERRORS = InvalidSignature, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError
LONGEST_LINE, LARGEST_BATCH, MOST_EPOCHS = 1 << 20, 1024, 1000  # bytes, events, rows
NEVER = float("inf")  # an index that is behind all others

def demand(condition, text):
    """What must be so is so, or nothing more is read."""
    if not condition:
        raise ValueError(text)

class Unknown(Exception):
    """What is read is of no form that is known here: nothing can be said of it."""

def known(read):
    """Reading anything else is `Unknown`."""
    def reading(path):
        try:
            return read(path)
        except (OSError, *ERRORS) as error:
            raise Unknown(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return reading

def form(**values):
    """Return what a line must be, to the byte, so that no two readers understand it differently."""
    return re.compile("{" + ", ".join(f'"{key}": {value}' for key, value in values.items()) + "}\n")

INT, HEX = "(?:0|[1-9][0-9]{0,17})", '"[0-9a-f]{64}"'
STRING = r'"(?:[ !#-\[\]-~]++|\\["\\bfnrt]|\\u[0-9a-f]{4})*+"'
HASHES, TIME = rf"\[(?:{HEX}(?:, {HEX})*)?\]", r"(?a:\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z)"
LOG_ID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
FIELDS = "at account_id class action target_kind target_id login client body".split()  # that are hashed
TEXTS = dict.fromkeys(FIELDS, STRING) | {"account_id": f"(?:null|{STRING})"}

LOG = form(format='"syncward-audit-export/1"', log_id=f'"{LOG_ID}"', first=INT, size=INT, checkpoint_size=INT,
           log_size=INT, software=STRING, frontier=HASHES, exported_at=f'"{TIME}"')
EVENT = form(index=INT, seq=INT, xid=INT, **TEXTS, leaf=HEX)
MISSING = form(index=INT, missing="true")
CHECKPOINT = form(text=STRING, signatures=STRING, count=INT, last_xid=INT, last_seq=INT)
EPOCH = form(epoch=INT, size=INT, reason=STRING, lost_size=f"(?:null|{INT})", lost_root=f"(?:null|{HEX})")
NAME = form(id=STRING, kind=STRING, name=STRING, salt=HEX)
PROOF = form(format='"syncward-audit-proof/1"', event=form(**TEXTS).pattern.rstrip("\n"),
             index=INT, size=INT, path=HASHES, note=STRING)

def read_lines(path, *forms):
    """Every line of a file must have one of the forms, and none may be too long."""
    with path.open("rb") as file:
        while line := file.readline(LONGEST_LINE + 1):
            demand(len(line) <= LONGEST_LINE, f"{path.name} has a line that is too long")
            right = any(form.fullmatch(line.decode("ascii")) for form in forms)
            demand(right, f"{path.name} has a line that is none: {line[:80]}")
            yield json.loads(line)

def read_events(here, expected):
    """Events must come in their order, each once. The last that is yielded is none."""
    for path in sorted((here / "events").glob("*.jsonl")):
        for event in read_lines(path, EVENT, MISSING):
            demand(event["index"] >= expected, "an event is twice or out of order")
            expected = event["index"] + 1
            yield event
    yield {"index": NEVER}

@known
def read_log(path):
    """log.json must name a range that can be, and the roots of the subtrees before it."""
    [log] = read_lines(path, LOG)
    can_be = log["first"] < log["size"] <= log["checkpoint_size"]
    demand(can_be and len(log["frontier"]) == log["first"].bit_count(), "log.json names a range that cannot be")
    return log | {"exported_at": datetime.fromisoformat(log["exported_at"])}

def read_proof(path):
    """A proof must be one line of its form."""
    if not path.is_file() or not path.open("rb").read(64).startswith(b'{"format": "syncward-audit-proof/1", '):
        raise Unknown(f"{path} is no proof")
    [said] = read_lines(path, PROOF)
    return said

FILES = re.compile(r"(log\.json|(epochs|checkpoints|names|ocsf)\.jsonl|hashes|SHA256SUMS"
                   r"|(verify|log_format)\.py|events/[0-9]{12}\.jsonl)")

def check_files(here):
    """Nothing but the plain files of an export may be there. Yield those that SHA256SUMS has otherwise."""
    there, sums = {"SHA256SUMS"}, {"SHA256SUMS": None}
    for path in here.rglob("*"):
        name = str(path.relative_to(here))
        plain = path.is_dir() if name == "events" else path.is_file() and FILES.fullmatch(name)
        demand(plain and not path.is_symlink(), f"{name} is no file of an export")
        there |= {name} if path.is_file() else set()
    with (here / "SHA256SUMS").open("rb") as file:
        while line := file.readline(LONGEST_LINE):
            digest, name = re.fullmatch(r"([0-9a-f]{64})  ([!-~]+)\n", line.decode("ascii")).groups()
            demand(name not in sums, "a sum is there twice")
            sums[name] = digest
    for name in sorted((there | sums.keys()) - {"SHA256SUMS"}):
        same = name in there and file_digest((here / name).open("rb"), "sha256").hexdigest() == sums.get(name)
        if not same:
            yield name, name in there

def check_names(path):
    """A name must be what its id was made of, so that no other can be put behind it."""
    for said in read_lines(path, NAME) if path.exists() else ():
        fields = bytes.fromhex(said["salt"]), said["kind"].encode(), said["name"].encode()
        id_ = sha256(netstrings(b"syncward/principal/v1", *fields)).hexdigest()[:32]
        demand(said["id"] == id_, "names.jsonl has a name that its id does not mean")

def netstrings(*fields):
    """Return bytes that only these fields make."""
    return b"".join(b"%d:%b," % (len(field), field) for field in fields)

def leaf(event):
    """Return the hash of an event, over all of its fields."""
    fields = [(event[name] or "").encode("utf-8", "surrogatepass") for name in FIELDS]
    return sha256(b"\0" + netstrings(b"syncward/audit/v1", *fields)).digest()

def node(left, right):
    """Return the hash of two subtrees (RFC 6962)."""
    return sha256(b"\1" + left + right).digest()

def add(tree, size, hash_):
    """Add a leaf to a tree, which has that size then: the roots of full subtrees, the largest first."""
    while size % 2 == 0:
        hash_, size = node(tree.pop(), hash_), size // 2
    tree.append(hash_)

def root_of(tree):
    """Return the root of a tree."""
    return reduce(lambda right, left: node(left, right), reversed(tree))

def root_from(hash_, index, size, path):
    """Return the root to which a path leads from a leaf (RFC 9162, section 2.1.3.2)."""
    last = size - 1
    for other in path:
        hash_ = node(other, hash_) if index % 2 or index == last else node(hash_, other)
        while index == last and index and index % 2 == 0:
            index, last = index // 2, last // 2
        index, last = index // 2, last // 2
    return None if last else hash_

def read_key(line):
    """A key must be of Ed25519, and the hash in its line its own. Return (name, hash) and key."""
    name, hash_, raw = re.fullmatch(r"([^\s+]+)\+([0-9a-f]{8})\+([A-Za-z0-9+/]+={0,2})", line.strip()).groups()
    raw = base64.b64decode(raw, validate=True)
    own = sha256(name.encode() + b"\n" + raw).hexdigest()[:8]
    demand(raw[:1] == b"\1" and hash_ == own, "a key is not of Ed25519, or its hash is not its own")
    return (name, bytes.fromhex(hash_)), Ed25519PublicKey.from_public_bytes(raw[1:])

@known
def read_keys(path):
    """A file must hold a key a line."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip() and line[0] != "#"]
    demand(lines, "no public key")
    return dict(map(read_key, lines))

class Keys:
    """Who may sign: the keys of a file, and those that the log names, up to where they are replaced."""

    def __init__(self, path):
        self.known, self.until, self.rotated = read_keys(path), {}, []

    def signers(self, text, signatures):
        """Whoever is named must have signed, if it is one of the keys. Return who that is."""
        signed = set()
        for line in signatures.splitlines():
            name, raw = re.fullmatch(r"— ([^\s+]+) ([A-Za-z0-9+/]+={0,2})", line).groups()
            raw = base64.b64decode(raw, validate=True)
            if (name, raw[:4]) in self.known:
                self.known[name, raw[:4]].verify(raw[4:], text.encode())
                signed.add((name, raw[:4]))
        return signed

    def trusts(self, signed, size):
        """A key that was replaced counts up to the checkpoint at which the new one signed alone."""
        return any(size <= self.until.get(key, NEVER) for key in signed)

    def counts(self, point, log_id):
        """Whoever can write to an anchor cannot accuse a log: a trusted key must have signed."""
        with suppress(*ERRORS):
            return point.log_id == log_id and self.trusts(self.signers(point.text, point.signatures), point.size)

    def rotate(self, said):
        """Another key follows one: it counts from now on."""
        name, key = read_key(said["after"])
        self.rotated.append((read_key(said["before"])[0], name))
        self.known.setdefault(name, key)

    def replace(self, signed, size):
        """A key whose successor signed without it counts no further."""
        for old, new in self.rotated:
            if new in signed and old not in signed:
                self.until.setdefault(old, size)

def statement(log_id, action, said):
    """Return what the sealer signs of what it says: three lines, the last of them canonical JSON."""
    rest = {key: value for key, value in said.items() if key != "signature"}
    return f"syncward/statement/{log_id}\n{action}\n{json.dumps(rest, sort_keys=True, separators=(',', ':'))}\n"

Checkpoint = namedtuple("Checkpoint", "text signatures log_id size root epoch time")
TEXT = re.compile(rf"syncward/audit/({LOG_ID})\n(0|[1-9][0-9]{{0,17}})\n([A-Za-z0-9+/]{{43}}=)\n"
                  rf"epoch ([1-9][0-9]{{0,9}})\ntime ({TIME})\n")

def parse_checkpoint(text, signatures):
    """A checkpoint must be five lines, to the byte."""
    log_id, size, root, epoch, time = TEXT.fullmatch(text).groups()
    root, time = base64.b64decode(root), datetime.fromisoformat(time)
    return Checkpoint(text, signatures, log_id, int(size), root, int(epoch), time)

def parse_note(note):
    """A signed note must be a checkpoint, an empty line, and whole lines of signatures."""
    text, _, signatures = note.rpartition("\n\n")
    demand(signatures.endswith("\n"), "a note is cut")
    return parse_checkpoint(text + "\n", signatures)

def notes_in(path):
    """Yield the checkpoints that a file of any kind holds; one that is cut is none."""
    for note in re.findall("syncward-checkpoint ([A-Za-z0-9+/]+={0,2})", path.read_text("utf-8", "replace") if path.is_file() else ""):
        with suppress(*ERRORS):
            yield parse_note(base64.b64decode(note).decode())
