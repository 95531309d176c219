"""The hash of an event, made from its fields alone. docs/audit.md "Bytes" is the definition."""

from hashlib import sha256

_PREFIX = "\x00" + "17:syncward/audit/v1,"


def leaf(  # noqa: PLR0917 - the fields in the order in which they are hashed
    at: str,
    account_id: str,
    class_: str,
    action: str,
    target_kind: str,
    target_id: str,
    login: str,
    client: str,
    body: str,
) -> bytes:
    """Return SHA-256 over a zero byte and the fields as netstrings; an absent one is empty.

    Every event of the log passes here: in ASCII, which they mostly are, characters are bytes.
    """
    joined = (
        f"{_PREFIX}{len(at)}:{at},{len(account_id)}:{account_id},{len(class_)}:{class_},"
        f"{len(action)}:{action},{len(target_kind)}:{target_kind},{len(target_id)}:{target_id},"
        f"{len(login)}:{login},{len(client)}:{client},{len(body)}:{body},"
    )
    if joined.isascii():
        return sha256(joined.encode()).digest()
    fields = (at, account_id, class_, action, target_kind, target_id, login, client, body)
    encoded = [field.encode("utf-8", "surrogatepass") for field in fields]
    return sha256(
        _PREFIX.encode() + b"".join(b"%d:%b," % (len(field), field) for field in encoded)
    ).digest()
