-- Brings cold instances back from SQL, those that are still absent.
--
-- KEYS   a meta for each SQL watermark, twice if two looks at SQL found its partition at two. Instance keys are built from its
--        prefix and lie in the same slot.
-- ARGV 1 a stream of values, or one array of them (as in apply.lua): the watermark of each of KEYS, as SQL had it in the same
--        snapshot as the checkpoints; shapes (see include/shapes); items to the end: index in KEYS, "machine:id", text of `@`,
--        ring, shape index, then the texts of the shape's fields
--
-- Reply  one string, a line per item:
--   OK                              written
--   EXISTS                          it is hot: nothing written, whatever SQL said
--   STALE evicted_to                SQL's snapshot is older than what Redis has dropped: nothing written
--   EPOCH | RECOVERING | IDENTITY   not admitted: nothing written
-- Cost   about 8 us an item of five fields: HSET, and to unpack its values.
--@include unpacked
--@include identity
--@include ids
--@include ready_or_fenced
local values = { unpacked(ARGV[1]) }
if type(values[1]) == 'table' then values = values[1] end
local last, behind, watermarks = #values, #KEYS + 1, values
--@include shapes
local call, here, refused, stale, prefixes, lines = redis.call, identity(), {}, {}, {}, {}
for p = 1, #KEYS do
  refused[p] = refusal(KEYS[p], here, '')
  local evicted_to = call('HGET', KEYS[p], 'evicted_to') or '0-0'
  stale[p] = id_above(evicted_to, watermarks[p]) and 'STALE ' .. evicted_to
  prefixes[p] = string.sub(KEYS[p], 1, -5) .. 'i:'
end
-- Mostly all are absent, which one call tells of hundreds for what it would take to ask for each. Not where one stands here twice:
-- the first is written, and the second finds it.
local keys, seen, count, all_absent, first = {}, {}, 0, true, behind
while first < last do
  local key = prefixes[values[first]] .. values[first + 1]
  count = count + 1
  keys[count], all_absent, seen[key] = key, all_absent and not seen[key], true
  first = first + 5 + sizes[values[first + 4]]
end
local PIECE = 2000 -- of what fits on Lua's stack: an instance may be of a time when settings allowed more fields than that
for n = 1, count, PIECE do
  all_absent = all_absent and call('EXISTS', unpack(keys, n, math.min(n + PIECE - 1, count))) == 0
end
for n = 1, count do
  local p, key, shape = values[behind], keys[n], values[behind + 4]
  local set, size = arguments[shape], sizes[shape]
  if refused[p] then
    lines[n] = refused[p]
  elseif not all_absent and call('EXISTS', key) == 1 then
    lines[n] = 'EXISTS'
  elseif stale[p] then
    lines[n] = stale[p]
  else
    set[2], set[4] = values[behind + 2], values[behind + 3]
    for k = 1, size do set[4 + 2 * k] = values[behind + 4 + k] end
    local set_last = 4 + 2 * size
    call('HSET', key, unpack(set, 1, math.min(set_last, PIECE)))
    for k = PIECE + 1, set_last, PIECE do call('HSET', key, unpack(set, k, math.min(k + PIECE - 1, set_last))) end
    lines[n] = 'OK'
  end
  behind = behind + 5 + size
end
return table.concat(lines, '\n')
