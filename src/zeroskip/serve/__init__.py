"""An OpenAI-compatible server for one model: `zeroskip serve DIR`.

transformers schedules (its continuous batching), FastAPI and uvicorn speak HTTP; what is here joins them.

  app.py          the routes, and what each route shares: the key, readiness, metrics
  protocol.py     requests and answers as OpenAI writes them; errors.py their errors
  engine.py       one model under transformers' ContinuousBatchingManager; attention.py and sampling.py are its plug-ins
  embed.py        encoders
"""

from zeroskip.serve.settings import Settings

__all__ = ["Settings"]
