"""`relay roles`."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from relay_grpc.cli.client import Json, connected
from relay_grpc.cli.output import fields, listing, moment, plain, show

if TYPE_CHECKING:
    from relay.v1 import auth_pb2

app = typer.Typer(help="Make roles of the workspace's own, and give users theirs.", no_args_is_help=True)

UserId = Annotated[str, typer.Argument(metavar="USER", help="The user's id at its issuer: the claim 'sub'.")]
Issuer = Annotated[
    str, typer.Option(metavar="URL", help="The claim 'iss'. Unset: the only issuer that the server knows.")
]


@app.command("list")
def list_roles(ctx: typer.Context, as_json: Json = False) -> None:
    """List the built-in roles and those of the workspace."""
    with connected(ctx) as relay:
        found = list(relay.auth.list_roles())
    show(found, _roles, as_json=as_json)


@app.command()
def create(
    ctx: typer.Context,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Lower case letters, digits and hyphens, 1 to 63 characters.")
    ],
    parent: Annotated[str, typer.Option(metavar="ROLE", help="What it narrows: admin, developer or viewer.")],
    scope: Annotated[list[str], typer.Option(metavar="SCOPE", help="A scope of that to keep. Repeatable.")],
    as_json: Json = False,
) -> None:
    """Make a role that keeps some scopes of a built-in one."""
    with connected(ctx) as relay:
        made = relay.auth.create_role(name, parent, scope)
    show(made, _role, as_json=as_json)


@app.command()
def delete(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A role of the workspace.")],
    as_json: Json = False,
) -> None:
    """Delete a role that no user has, and no key that was not revoked."""
    with connected(ctx) as relay:
        done = relay.auth.delete_role(name)
    show(done, lambda _: plain(f"The role {name} is deleted."), as_json=as_json)


@app.command()
def assign(
    ctx: typer.Context,
    user_id: UserId,
    role: Annotated[str, typer.Argument(metavar="ROLE", help="One of 'relay roles list'.")],
    issuer: Issuer = "",
    as_json: Json = False,
) -> None:
    """Give a user its one role in the workspace."""
    with connected(ctx) as relay:
        assignment = relay.auth.assign_role(user_id, role, issuer=issuer)
    show(assignment, _assignment, as_json=as_json)


@app.command()
def remove(ctx: typer.Context, user_id: UserId, issuer: Issuer = "", as_json: Json = False) -> None:
    """Take a user's role away."""
    with connected(ctx) as relay:
        done = relay.auth.remove_role(user_id, issuer=issuer)
    show(done, lambda _: plain(f"{user_id} has no role any more."), as_json=as_json)


@app.command()
def assignments(ctx: typer.Context, as_json: Json = False) -> None:
    """List the users of the workspace and their roles, newest first."""
    with connected(ctx) as relay:
        found = list(relay.auth.list_role_assignments())
    show(found, _assignments, as_json=as_json)


def _roles(roles: list["auth_pb2.Role"]) -> RenderableType:
    return listing(
        ("NAME", "NARROWS", "SCOPES"),
        ((role.name, role.parent or Text("built in", "dim"), " ".join(role.scopes)) for role in roles),
        none="No roles.",
    )


def _role(role: "auth_pb2.Role") -> RenderableType:
    return fields(
        {
            "name": role.name,
            "narrows": role.parent,
            "scopes": " ".join(role.scopes),
            "created": moment(role, "create_time"),
        }
    )


def _assignments(assignments: list["auth_pb2.RoleAssignment"]) -> RenderableType:
    return listing(
        ("USER", "ROLE", "ISSUER"),
        ((one.user_id, one.role, one.issuer) for one in assignments),
        none="No user has a role here. 'relay roles assign' gives one.",
    )


def _assignment(assignment: "auth_pb2.RoleAssignment") -> RenderableType:
    return fields(
        {
            "user": assignment.user_id,
            "issuer": assignment.issuer,
            "role": assignment.role,
            "creator": assignment.creator,
            "assigned": moment(assignment, "create_time"),
        }
    )
