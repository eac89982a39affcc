-- For a Redis emulator without MessagePack: the same as JSON.
local unpacked = cjson.decode
