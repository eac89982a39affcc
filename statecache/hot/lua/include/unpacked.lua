-- What a client packed: MessagePack, a third cheaper to read than JSON, which would escape every JSON text within it.
local unpacked = cmsgpack.unpack
