"""The viewer's page, and its server."""

from pathlib import Path
from typing import Any

import gradio as gr

from core.errors import UserError
from data.inputs import SAMPLES
from viewer.animate_tab import AnimateTab
from viewer.attention_tab import AttentionTab
from viewer.controls import Machine

TITLE = "TPC-Animate viewer"
FONTS = ("system-ui", "sans-serif")  # gradio's own would be fetched from a font service
MONOSPACE = ("ui-monospace", "monospace")
SESSIONS = 4  # the last of them keep their recorded attention; older ones have to press Run again


def build_page(machine: Machine) -> gr.Blocks:
    """Both tabs; everything that belongs to a session is in its `gr.State`."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"## {TITLE}")
        with gr.Tab("Attention"):
            AttentionTab(machine)
        with gr.Tab("Animate"):
            AnimateTab(machine)
    return page


def serve(page: gr.Blocks, server_name: str, port: int, folder: Path, wait: bool = True) -> str:
    """Serve the page, with `wait` until it is interrupted, and return its address.

    Args:
        port: 0 takes a free one.
        folder: of the videos of runs.
    """
    options: dict[str, Any] = {} if port == 0 else {"server_port": port}
    try:
        _, address, _ = page.queue().launch(
            server_name=server_name,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
            allowed_paths=[str(SAMPLES), str(folder)],
            state_session_capacity=SESSIONS,
            theme=gr.themes.Default(font=FONTS, font_mono=MONOSPACE),
            **options,
        )
    except OSError:
        raise UserError(
            f"server_name={server_name} port={port} cannot be listened at; choose another port, such as {port + 1}"
        ) from None
    if wait:
        print(f"viewer: {address} (Ctrl-C ends it)")
        page.block_thread()
    return address
