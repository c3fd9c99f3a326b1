"""`mpt cache`: what prepared data takes on the disk, and removing it."""

import json
import sys
from typing import Annotated

import typer

app = typer.Typer(help="Show and clear the cache of prepared data.", no_args_is_help=True)


@app.command("list")
def list_all(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show where prepared data is kept and what each kind of it takes."""
    import os
    from dataclasses import asdict

    from mpt.running.data_cache import cache_root, measure

    root = cache_root(os.environ)
    kinds = measure(root)
    total = sum(kind.bytes for kind in kinds)
    if as_json:
        print(json.dumps({"folder": str(root), "bytes": total, "kinds": [asdict(kind) for kind in kinds]}, indent=2))
        return
    for kind in kinds:
        print(f"{kind.bytes / 2**20:10.1f} MiB  {kind.entries:5}  {kind.name:<13}  {kind.what}")
    print(f"{total / 2**20:10.1f} MiB  in {root}")


@app.command("clear")
def clear() -> None:
    """Remove all that is in it but what is being prepared; later runs prepare anew."""
    import os

    from mpt.running import data_cache

    root = data_cache.cache_root(os.environ)
    before = sum(kind.bytes for kind in data_cache.measure(root))
    for path in data_cache.clear(root):
        print(f"{path} stays: it is being prepared", file=sys.stderr)
    freed = before - sum(kind.bytes for kind in data_cache.measure(root))
    print(f"{freed / 2**20:.1f} MiB freed in {root}")
