"""The part of etcd's version 3 interface that is spoken here: messages by name, fields and their numbers.

Written down instead of generated: generated code fits only some versions of protobuf, and no client of etcd on PyPI is
kept well enough to depend on for these few lines.  The numbers are etcd's own (``rpc.proto``, ``kv.proto``) and
never change.  The descriptors live in a pool of their own, so that any other etcd client may run in the same process.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "resilient_train.etcd"
# name: type (a scalar, or a message; * if repeated) and number of each field.  Enumerations travel as int32.
_MESSAGES = {
    "Header": "cluster_id uint64 1, member_id uint64 2, revision int64 3, raft_term uint64 4",
    "KeyValue": "key bytes 1, create_revision int64 2, mod_revision int64 3, version int64 4, value bytes 5,"
    " lease int64 6",
    "Event": "type int32 1, kv KeyValue 2",
    "RangeRequest": "key bytes 1, range_end bytes 2, keys_only bool 8",
    "RangeResponse": "header Header 1, kvs KeyValue* 2, count int64 4",
    "PutRequest": "key bytes 1, value bytes 2, lease int64 3, ignore_lease bool 6",
    "PutResponse": "header Header 1",
    "DeleteRangeRequest": "key bytes 1, range_end bytes 2",
    "DeleteRangeResponse": "header Header 1, deleted int64 2",
    "Compare": "result int32 1, target int32 2, key bytes 3, version int64 4, mod_revision int64 6, value bytes 7,"
    " range_end bytes 64",
    "RequestOp": "request_range RangeRequest 1, request_put PutRequest 2, request_delete_range DeleteRangeRequest 3",
    "ResponseOp": "response_range RangeResponse 1, response_put PutResponse 2,"
    " response_delete_range DeleteRangeResponse 3",
    "TxnRequest": "compare Compare* 1, success RequestOp* 2, failure RequestOp* 3",
    "TxnResponse": "header Header 1, succeeded bool 2, responses ResponseOp* 3",
    "WatchCreateRequest": "key bytes 1, range_end bytes 2, start_revision int64 3",
    "WatchRequest": "create_request WatchCreateRequest 1",
    "WatchResponse": "header Header 1, created bool 3, canceled bool 4, compact_revision int64 5,"
    " cancel_reason string 6, events Event* 11",
    "LeaseGrantRequest": "TTL int64 1, ID int64 2",
    "LeaseGrantResponse": "header Header 1, ID int64 2, TTL int64 3",
    "LeaseRevokeRequest": "ID int64 1",
    "LeaseRevokeResponse": "header Header 1",
    "LeaseKeepAliveRequest": "ID int64 1",
    "LeaseKeepAliveResponse": "header Header 1, ID int64 2, TTL int64 3",
    "AuthenticateRequest": "name string 1, password string 2",
    "AuthenticateResponse": "header Header 1, token string 2",
    "Member": "ID uint64 1, name string 2, peerURLs string* 3, clientURLs string* 4",
    "MemberAddRequest": "peerURLs string* 1",
    "MemberAddResponse": "header Header 1, member Member 2, members Member* 3",
    "MemberRemoveRequest": "ID uint64 1",
    "MemberRemoveResponse": "header Header 1, members Member* 2",
    "MemberListRequest": "linearizable bool 1",
    "MemberListResponse": "header Header 1, members Member* 2",
    "StatusRequest": "",
    "StatusResponse": "header Header 1, version string 2, leader uint64 4",
    "MoveLeaderRequest": "targetID uint64 1",
    "MoveLeaderResponse": "header Header 1",
}
_SERVICES = {
    "KV": ("Range", "Txn"),
    "Watch": ("Watch",),
    "Lease": ("LeaseGrant", "LeaseRevoke", "LeaseKeepAlive"),
    "Auth": ("Authenticate",),
    "Cluster": ("MemberAdd", "MemberRemove", "MemberList"),
    "Maintenance": ("Status", "MoveLeader"),
}
METHODS = {method: f"/etcdserverpb.{service}/{method}" for service, methods in _SERVICES.items() for method in methods}
"""The path of each method.  Its messages are called after it, with Request and Response."""
DELETE = 1
"""`Event.type` of a key that is gone; 0 for one that was put."""
EQUAL = 0
"""`Compare.result`."""
VERSION, MOD_REVISION, VALUE = 0, 2, 3
"""`Compare.target`."""


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field in filter(None, fields.split(", ")):
            label, kind, number = field.split()
            added = message.field.add(name=label, number=int(number), label=kinds.LABEL_OPTIONAL)
            if kind.endswith("*"):
                kind, added.label = kind[:-1], kinds.LABEL_REPEATED
            if kind in _MESSAGES:
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                added.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


_CLASSES = _classes()


def request(method: str, **fields: Any) -> Any:
    """The request of a method."""
    return _CLASSES[f"{method}Request"](**fields)


def response(method: str) -> Any:
    """The class of a method's answers."""
    return _CLASSES[f"{method}Response"]


def message(name: str, **fields: Any) -> Any:
    """A message that is a part of others."""
    return _CLASSES[name](**fields)


def absent(key: bytes, range_end: bytes) -> Any:
    """The condition that there is no key in a range."""
    return message("Compare", key=key, range_end=range_end, target=VERSION, result=EQUAL, version=0)


def unchanged(key: bytes, mod_revision: int) -> Any:
    """The condition that a key was last put at this revision; 0: that there is none."""
    return message("Compare", key=key, target=MOD_REVISION, result=EQUAL, mod_revision=mod_revision)


def holds(key: bytes, value: bytes) -> Any:
    """The condition that a key has this value."""
    return message("Compare", key=key, target=VALUE, result=EQUAL, value=value)


def at_version(key: bytes, version: int) -> Any:
    """The condition that a key was put so many times since it exists."""
    return message("Compare", key=key, target=VERSION, result=EQUAL, version=version)


def put(key: bytes, value: bytes, lease: int = 0, *, keep_lease: bool = False) -> Any:
    """A put, as an operation of a transaction."""
    made = message("PutRequest", key=key, value=value, lease=lease, ignore_lease=keep_lease)
    return message("RequestOp", request_put=made)


def get(key: bytes, *, keys_only: bool = False) -> Any:
    """A read, as an operation of a transaction."""
    return message("RequestOp", request_range=message("RangeRequest", key=key, keys_only=keys_only))


def delete(key: bytes, range_end: bytes) -> Any:
    """A deletion, as an operation of a transaction."""
    return message("RequestOp", request_delete_range=message("DeleteRangeRequest", key=key, range_end=range_end))


def found(answer: Any, index: int = 0) -> Any | None:
    """What a read of a transaction found, by its place among the operations; None if the key does not exist."""
    kvs = answer.responses[index].response_range.kvs
    return kvs[0] if kvs else None


def prefix_end(prefix: bytes) -> bytes:
    """The end of the range of all keys that begin with ``prefix`` (whose last byte is not 255)."""
    return prefix[:-1] + bytes([prefix[-1] + 1])
