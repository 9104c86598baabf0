"""Ways in which somebody who rules the database tampers with an audit log, as superuser and past every trigger.

Each changes the victim's log, or what is kept to prove it, and returns whether the server has to go on logging for that
to show. `other` is a workspace beside it whose rows the attacker may use.
"""

from uuid import uuid4

from relay_grpc.audit.checkpoint import Signer
from relay_grpc.audit.event import ERASABLE, SALT_BYTES
from tests.audit.attack import Attack

NEWEST = "tree_size = (SELECT max(tree_size) FROM audit_checkpoints WHERE workspace_id = $1)"
EDITS = {  # of audit_logs, each of them to something else whatever there was
    "created_at": "created_at + interval '1 microsecond'",
    "actor_type": "CASE actor_type WHEN 'system' THEN 'user' ELSE 'system' END::actor_type",
    "action": "action || 'd'",
    "action_type": "action_type || 'd'",
    "provider": "provider || 'd'",
    "status": "CASE status WHEN 'success' THEN 'failed' ELSE 'success' END::event_outcome",
    "reason": "reason || 'd'",
    "scopes": "scopes || 'keys:write'::text",
    "request_id": "request_id || 'd'",
    "trace_id": "trace_id || 'd'",
    "duration": "duration + interval '1 microsecond'",
    "count": "count + 1",
    "commitments": "commitments[1:7] || sha256('d')",
    "id": "gen_random_uuid()",
    "workspace_id": "gen_random_uuid()",
}


async def edit_an_event(attack: Attack) -> bool:
    column = attack.rng.choice(list(EDITS))
    event = await attack.event()
    await attack.run(
        f"UPDATE audit_logs SET {column} = {EDITS[column]} WHERE workspace_id = $1 AND id = $2", event["id"]
    )
    if column not in ("id", "workspace_id") and attack.rng.random() < 0.5:
        await attack.rebuild()
    return False


async def edit_a_value(attack: Attack) -> bool:
    column = attack.rng.choice(ERASABLE)
    event = await attack.event()
    changed = f"{column} = left(coalesce({column}, '') || 'd', 60) || 'd'"
    await attack.run(f"UPDATE audit_values SET {changed} WHERE workspace_id = $1 AND id = $2", event["id"])
    return False


async def edit_a_salt(attack: Attack) -> bool:
    event = await attack.event()
    value = attack.rng.choice([n for n, committed in enumerate(event["commitments"]) if committed])
    place = SALT_BYTES * value + attack.rng.randrange(SALT_BYTES)
    changed = "salts = set_byte(salts, $3, get_byte(salts, $3) # $4)"
    await attack.run(
        f"UPDATE audit_values SET {changed} WHERE workspace_id = $1 AND id = $2",
        event["id"],
        place,
        attack.rng.randint(1, 255),
    )
    return False


async def erase_without_a_trace(attack: Attack) -> bool:
    event = await attack.event(where="commitments[1] IS NOT NULL")  # of actor_id
    match attack.rng.randrange(3):
        case 0:
            await attack.run("DELETE FROM audit_values WHERE workspace_id = $1 AND id = $2", event["id"])
        case 1:
            await attack.run("UPDATE audit_values SET actor_id = NULL WHERE workspace_id = $1 AND id = $2", event["id"])
        case 2:
            await attack.run("UPDATE audit_values SET actor_id = '' WHERE workspace_id = $1 AND id = $2", event["id"])
    return False


async def delete_in_the_middle(attack: Attack) -> bool:
    event = await attack.event()
    await attack.run("DELETE FROM audit_logs WHERE workspace_id = $1 AND id = $2", event["id"])
    thorough = attack.rng.randrange(4)
    if thorough > 0:
        await attack.run("DELETE FROM audit_leaves WHERE workspace_id = $1 AND event_id = $2", event["id"])
    if thorough > 1:
        await attack.close_gap(event["leaf_index"])
        await attack.rebuild()
    if thorough > 2:
        await attack.run(f"UPDATE audit_checkpoints SET tree_size = tree_size - 1 WHERE workspace_id = $1 AND {NEWEST}")
    return False


async def cut_the_tail(attack: Attack) -> bool:
    await attack.cut(await attack.earlier())
    return False


async def cut_the_tail_and_go_on(attack: Attack) -> bool:
    """The server signs a log that is as long as before, and longer."""
    await attack.cut(await attack.earlier())
    return True


async def cut_the_checkpoints(attack: Attack) -> bool:
    size = await attack.earlier()
    await attack.run("DELETE FROM audit_checkpoints WHERE workspace_id = $1 AND tree_size > $2", size)
    return attack.rng.random() < 0.5


async def insert_without_a_place(attack: Attack) -> bool:
    await attack.insert(None)
    return False


async def insert_with_a_place(attack: Attack) -> bool:
    size = await attack.size()
    match attack.rng.randrange(3):
        case 0:  # beside another
            await attack.insert(attack.rng.randrange(size))
        case 1:  # between two
            at = attack.rng.randrange(1, size)
            await attack.run(
                "UPDATE audit_leaves SET leaf_index = leaf_index + 1 WHERE workspace_id = $1 AND leaf_index >= $2", at
            )
            await attack.insert(at)
            await attack.rebuild()
        case 2:  # at the end, where the server will put the next one
            await attack.insert(size)
            return True
    return False


async def reorder(attack: Attack) -> bool:
    one, two = attack.rng.sample(await attack.events(), 2)
    for event, index in ((one, two["leaf_index"]), (two, one["leaf_index"])):
        await attack.run(
            "UPDATE audit_leaves SET leaf_index = $3 WHERE workspace_id = $1 AND event_id = $2", event["id"], index
        )
    if attack.rng.random() < 0.5:
        await attack.rebuild()
    return False


async def swap_events_of_two_workspaces(attack: Attack) -> bool:
    ours, theirs = await attack.event(), await attack.event(attack.other)
    for table in ("audit_logs", "audit_values") + (("audit_leaves",) if attack.rng.random() < 0.7 else ()):
        key = "event_id" if table == "audit_leaves" else "id"
        for id_, workspace in ((ours["id"], attack.other), (theirs["id"], attack.victim)):
            await attack.connection.execute(f"UPDATE {table} SET workspace_id = $2 WHERE {key} = $1", id_, workspace)
    for id_, index in ((ours["id"], theirs["leaf_index"]), (theirs["id"], ours["leaf_index"])):
        await attack.connection.execute("UPDATE audit_leaves SET leaf_index = $2 WHERE event_id = $1", id_, index)
    return False


async def swap_all_of_two_workspaces(attack: Attack) -> bool:
    """The other's log under the victim's name: leaves say whose they are, so the ids of workspaces come with them."""
    between = uuid4()
    for table in ("audit_logs", "audit_values", "audit_leaves", "audit_tiles", "audit_checkpoints"):
        for before, after in ((attack.victim, between), (attack.other, attack.victim), (between, attack.other)):
            await attack.connection.execute(
                f"UPDATE {table} SET workspace_id = $2 WHERE workspace_id = $1", before, after
            )
    return attack.rng.random() < 0.5


async def swap_or_edit_tiles(attack: Attack) -> bool:
    if attack.rng.random() < 0.5:
        place = attack.rng.randrange(32 * await attack.size())
        await attack.run(
            "UPDATE audit_tiles SET hashes = set_byte(hashes, $2, get_byte(hashes, $2) # 1) WHERE workspace_id = $1",
            place,
        )
    else:
        between = uuid4()
        for before, after in ((attack.victim, between), (attack.other, attack.victim), (between, attack.other)):
            await attack.connection.execute(
                "UPDATE audit_tiles SET workspace_id = $2 WHERE workspace_id = $1", before, after
            )
    return attack.rng.random() < 0.5


async def replace_the_checkpoint(attack: Attack) -> bool:
    """With another one's note, or its own with other words in it."""
    change, *arguments = attack.rng.choice(
        [
            (
                "note = (SELECT note FROM audit_checkpoints WHERE workspace_id = $2 ORDER BY tree_size DESC LIMIT 1)",
                attack.other,
            ),
            (
                "note = (SELECT note FROM audit_checkpoints WHERE workspace_id = $1 AND tree_size = $2)",
                await attack.earlier(),
            ),
            (
                "note = replace(note, $2::text, (2 * $3::bigint)::text)",
                f"\n{await attack.size()}\n",
                await attack.size(),
            ),
            ("tree_size = tree_size + 1",),
        ]
    )
    await attack.run(f"UPDATE audit_checkpoints SET {change} WHERE workspace_id = $1 AND {NEWEST}", *arguments)
    return False


async def sign_with_another_key(attack: Attack) -> bool:
    """Everything consistent, but for the key: it may have the name of the server's."""
    event = await attack.event()
    await attack.run("UPDATE audit_logs SET action = action || 'd' WHERE workspace_id = $1 AND id = $2", event["id"])
    await attack.rebuild()
    note = await attack.connection.fetchval(
        "SELECT note FROM audit_checkpoints WHERE workspace_id = $1 LIMIT 1", attack.victim
    )
    name = attack.rng.choice(["mallory", note.split("\N{EM DASH} ")[1].split(" ")[0]])
    await attack.sign(Signer({name: attack.rng.randbytes(32)}))
    return attack.rng.random() < 0.5


async def keep_an_event_from_the_log(attack: Attack) -> bool:
    """One that was written, before it got its place."""
    await attack.act()
    await attack.run("DELETE FROM audit_pending WHERE workspace_id = $1")
    return True


async def have_history_signed_anew(attack: Attack) -> bool:
    """An event is another, and the server itself makes the log from the beginning."""
    event = await attack.event()
    change = attack.rng.choice(["action = action || 'd'", "created_at = created_at - interval '1 day'", "count = 7"])
    await attack.run(f"UPDATE audit_logs SET {change} WHERE workspace_id = $1 AND id = $2", event["id"])
    for table in ("audit_leaves", "audit_tiles", "audit_checkpoints"):
        await attack.run(f"DELETE FROM {table} WHERE workspace_id = $1")
    await attack.run("INSERT INTO audit_pending SELECT id, workspace_id FROM audit_logs WHERE workspace_id = $1")
    return True


async def forge_an_earlier_state(attack: Attack) -> bool:
    """Cut to where it was, filled up with events that never were, and signed by the server."""
    size, before = await attack.earlier(), await attack.size()
    await attack.cut(size)
    for _ in range(before - size):
        await attack.insert(None)
    await attack.run(
        "INSERT INTO audit_pending SELECT id, workspace_id FROM audit_logs l WHERE workspace_id = $1 AND NOT EXISTS "
        "(SELECT FROM audit_leaves e WHERE e.workspace_id = $1 AND e.event_id = l.id)"
    )
    return True


async def empty_it(attack: Attack) -> bool:
    for table in ("audit_logs", "audit_values", "audit_leaves", "audit_tiles", "audit_checkpoints"):
        await attack.run(f"DELETE FROM {table} WHERE workspace_id = $1")
    return True


KINDS = (
    edit_an_event,
    edit_a_value,
    edit_a_salt,
    erase_without_a_trace,
    delete_in_the_middle,
    cut_the_tail,
    cut_the_tail_and_go_on,
    cut_the_checkpoints,
    insert_without_a_place,
    insert_with_a_place,
    reorder,
    swap_events_of_two_workspaces,
    swap_all_of_two_workspaces,
    swap_or_edit_tiles,
    replace_the_checkpoint,
    sign_with_another_key,
    keep_an_event_from_the_log,
    have_history_signed_anew,
    forge_an_earlier_state,
    empty_it,
)
