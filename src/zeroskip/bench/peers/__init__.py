"""Other libraries, each in an environment and a process of its own. A new one: one file here, one import line below."""

from zeroskip.bench.peers import deepsparse as deepsparse
from zeroskip.bench.peers import llama_cpp as llama_cpp
from zeroskip.bench.peers import mkl as mkl
from zeroskip.bench.peers import onnxruntime as onnxruntime
from zeroskip.bench.peers import openvino as openvino
from zeroskip.bench.peers import torch_csr as torch_csr
from zeroskip.bench.peers.base import Peer, get, names

__all__ = ["Peer", "get", "names"]
