"""`zeroskip serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from zeroskip.cli.terminal import command, say
from zeroskip.errors import ZeroskipError

__all__ = ["serve"]


@command("serve", "zeroskip serve model-compiled --port 8000 --api-key-env ZEROSKIP_KEY")
def serve(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="A model directory, compiled or not.")],
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is every network this machine is on.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    max_concurrency: Annotated[int, typer.Option(help="Requests that generate at the same time.")] = 16,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; more are told to come again.")] = 64,
    max_context: Annotated[
        int | None, typer.Option(help="Tokens of prompt and answer together. Default: the model's, as memory allows.")
    ] = None,
    cache_mb: Annotated[
        int | None,
        typer.Option(help="Memory for keys and values. Default: as needed, at most a quarter of what is free."),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable that holds the key clients must send.")
    ] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="Give each client the same bits as alone; slower.")
    ] = False,
) -> None:
    """Serve a language model or an encoder: /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models.

    /health tells when it is loaded, /metrics counts for Prometheus, and / is a page to try it. SIGTERM or Ctrl-C stops
    it once the requests that are running are finished.
    """
    if not model.is_dir():
        raise ZeroskipError(f"{model}: no such directory")
    key = None
    if api_key_env is not None:
        key = os.environ.get(api_key_env)
        if not key:
            raise ZeroskipError(
                f"--api-key-env {api_key_env}: there is no such environment variable; set it to the key"
            )
    try:
        from zeroskip.serve.run import serve as run
    except ImportError as error:
        raise ZeroskipError(f"serving needs more packages ({error}): pip install 'zeroskip[serve]'") from None
    from zeroskip.serve import Settings

    settings = Settings(model, host, port, max_concurrency, max_queue, max_context, cache_mb, key, batch_invariant)

    def loaded(room: Any) -> None:
        engine = room.engine
        if engine is None:
            say(f"ready: {settings.name}, an encoder")
            return
        say(f"ready: {settings.name}, up to {engine.context} tokens, {max_concurrency} requests at a time")
        if engine.invariance is not None:
            say("linear layers: " + ", ".join(f"{count} {how}" for how, count in sorted(engine.invariance.items())))

    run(settings, lambda address: say(f"listening on {address}, loading {model}"), loaded)
    say("stopped")
