"""`/tokenize`, `/detokenize`."""

from __future__ import annotations

from aiohttp import web

from engine.errors import InvalidRequestError
from engine.text.tokenizer import Tokenizer
from serving.endpoints.chat_input import chat_prompt, check_chat
from serving.http.body import read_body
from serving.http.context import ServerContext, context_of
from serving.http.reply import reply
from serving.http.routes import Route
from serving.protocol.chat import ChatRequest
from serving.protocol.tokenize import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse


def _tokenizer(context: ServerContext) -> Tokenizer:
    if context.client.tokenizer is None:
        raise InvalidRequestError("this engine has no tokenizer (skip_tokenizer_init).")
    return context.client.tokenizer


async def tokenize(request: web.Request) -> web.Response:
    """`POST /tokenize`."""
    context = context_of(request)
    body = await read_body(request, context, TokenizeRequest)
    context.check_model(body.model)
    tokenizer = _tokenizer(context)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give either prompt or messages.", "prompt")
    text = _conversation(context, body) if body.prompt is None else body.prompt
    special = body.prompt is not None if body.add_special_tokens is None else body.add_special_tokens
    ids = await context.encode(text, add_special_tokens=special)
    spelling = [tokenizer.backend.id_to_token(token) or "" for token in ids] if body.return_token_strs else None
    return reply(
        TokenizeResponse(
            count=len(ids), max_model_len=context.client.info.max_model_len, tokens=ids, token_strs=spelling
        )
    )


def _conversation(context: ServerContext, body: TokenizeRequest) -> str:
    """The text of `messages`, as the chat endpoint would make it."""
    chat = ChatRequest(
        messages=body.messages or [],
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template=body.chat_template,
        chat_template_kwargs=body.chat_template_kwargs,
        tools=body.tools,
        tool_choice="none" if body.tools else None,
    )
    check_chat(context, chat)
    return chat_prompt(context, chat)


async def detokenize(request: web.Request) -> web.Response:
    """`POST /detokenize`."""
    context = context_of(request)
    body = await read_body(request, context, DetokenizeRequest)
    context.check_model(body.model)
    tokenizer, size = _tokenizer(context), context.client.info.vocab_size
    for token in body.tokens:
        if not 0 <= token < size:
            raise InvalidRequestError(f"token id {token} is not in the vocabulary: ids are 0 to {size - 1}.", "tokens")
    return reply(DetokenizeResponse(prompt=tokenizer.decode(body.tokens)))


ROUTES = (
    Route(
        "POST", "/tokenize", tokenize, "Token ids of a text or of a conversation.", TokenizeRequest, TokenizeResponse
    ),
    Route("POST", "/detokenize", detokenize, "The text of token ids.", DetokenizeRequest, DetokenizeResponse),
)
