"""A bare grpc.aio server with one unary method that answers what it is sent. Ends when its standard input does."""

import asyncio
import sys

import grpc


async def answer(request: bytes, _context: object) -> bytes:
    return request


async def main() -> None:
    server = grpc.aio.server()
    server.add_registered_method_handlers("bench.Echo", {"Echo": grpc.unary_unary_rpc_method_handler(answer)})
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(1)


asyncio.run(main())
