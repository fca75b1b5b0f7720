"""Know it: devices, forecasts, measurements, accuracy."""
