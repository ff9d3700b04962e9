"""What each endpoint does: one module per API, each with its `ROUTES`. `ALL_ROUTES` is the server."""

from __future__ import annotations

from serving.endpoints import chat, completions, embeddings, health, messages, models, page, responses, steps, tokenize
from serving.http.routes import Route

ALL_ROUTES: tuple[Route, ...] = (
    *completions.ROUTES,
    *chat.ROUTES,
    *embeddings.ROUTES,
    *messages.ROUTES,
    *responses.ROUTES,
    *models.ROUTES,
    *tokenize.ROUTES,
    *health.ROUTES,
    *steps.ROUTES,
    *page.ROUTES,
)
