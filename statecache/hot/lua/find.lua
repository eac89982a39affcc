-- Reads one instance's entries behind the watermark: history that is not in SQL yet.
--
-- KEYS 1 meta, 2 log of the partition
-- ARGV 1 `machine\31id\31`, how the entry's text begins
--      2 entry id to read on behind, or '' for the watermark
--      3 entries to look at, at most
--
-- Reply  one string:
--   OK cursor           then a line `<id>\31<text>` per entry; cursor is where to read on, - at the end of the log
--   EPOCH | RECOVERING | IDENTITY   not admitted
-- Cost   0.4 us an entry of the partition's backlog.
--@include identity
--@include ready_or_fenced
local code = refusal(KEYS[1], identity(), '')
if code then return code end
local prefix, cursor, count = ARGV[1], ARGV[2], tonumber(ARGV[3])
if cursor == '' then cursor = redis.call('HGET', KEYS[1], 'watermark') or '0-0' end
local lines = { '' }
local page = redis.call('XRANGE', KEYS[2], '(' .. cursor, '+', 'COUNT', count)
for n = 1, #page do
  local id, fields = page[n][1], page[n][2]
  if fields[2] and string.sub(fields[2], 1, #prefix) == prefix then lines[#lines + 1] = id .. '\31' .. fields[2] end
  cursor = id
end
lines[1] = 'OK ' .. (#page < count and '-' or cursor)
return table.concat(lines, '\n')
