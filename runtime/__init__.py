"""Run it: devices, sessions, chat, on ONNX Runtime GenAI."""
