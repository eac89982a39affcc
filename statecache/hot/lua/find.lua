-- Reads entries of some instances behind the watermark: history that is not in SQL yet.
--
-- KEYS 1 meta, 2 log of the partition
-- ARGV 1 a JSON array of [`machine\31id\31`, how the entry's text begins, [what its rest holds, ...]]; '' is in every rest
--      2 entry id to read on behind, or '' for the watermark
--      3 entries to look at, at most
--      4 bytes of entries to look at, at most (one entry is always looked at)
--
-- Reply  one string:
--   OK cursor           then a line `<id>\31<text>` per entry; cursor is where to read on, - at the end of the log
--   EPOCH | RECOVERING | IDENTITY   not admitted
-- Cost   0.7 us an entry of the partition's backlog for one instance, 0.9 for hundreds. Of what is fetched beyond the bytes
--        see read.lua.
--@include identity
--@include ready_or_fenced
--@include pages
local code = refusal(KEYS[1], identity(), '')
if code then return code end
local find, match, cursor, count, bytes = string.find, string.match, ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local wanted = {}
for _, one in ipairs(cjson.decode(ARGV[1])) do wanted[one[1]] = one[2] end
if cursor == '' then cursor = redis.call('HGET', KEYS[1], 'watermark') or '0-0' end
local lines, page_size, seen, left, ended = { '' }, PAGE_FIRST, 0, bytes, false
while count > seen and left > 0 and not ended do
  local asked = math.min(count - seen, page_size)
  local page = redis.call('XRANGE', KEYS[2], '(' .. cursor, '+', 'COUNT', asked)
  for n = 1, #page do
    local id, text = page[n][1], page[n][2][2]
    local name = match(text, '^[^\31]*\31[^\31]*\31')
    local rests = name and wanted[name]
    for r = 1, rests and #rests or 0 do
      if find(text, rests[r], #name, true) then
        lines[#lines + 1] = id .. '\31' .. text
        break
      end
    end
    cursor, seen, left = id, seen + 1, left - #text
  end
  ended = #page < asked
  page_size = next_page(page_size, seen, bytes - left, left)
end
lines[1] = 'OK ' .. (ended and '-' or cursor)
return table.concat(lines, '\n')
