-- Brings cold instances back from SQL, those that are still absent.
--
-- KEYS   a meta for each SQL watermark, twice if two looks at SQL found its partition at two. Instance keys are built from its
--        prefix and lie in the same slot.
-- ARGV 1 packed (see include/unpacked): [watermarks, places, items]. watermarks: of each of KEYS, as SQL had it in the same
--        snapshot as the checkpoints; places: the index in KEYS of each item; an item: ["machine:id", "@", text, "@r", ring,
--        field, text, ...]
--
-- Reply  one string, a line per item:
--   OK                              written
--   EXISTS                          it is hot: nothing written, whatever SQL said
--   STALE evicted_to                SQL's snapshot is older than what Redis has dropped: nothing written
--   EPOCH | RECOVERING | IDENTITY   not admitted: nothing written
-- Cost   about 10 us an item of five fields: 4 to unpack it, 1 for EXISTS, 5 for HSET.
--@include unpacked
--@include identity
--@include ids
--@include ready_or_fenced
local request = unpacked(ARGV[1])
local watermarks, places, items = request[1], request[2], request[3]
local call, here, refused, stale, prefixes, lines = redis.call, identity(), {}, {}, {}, {}
for p = 1, #KEYS do
  refused[p] = refusal(KEYS[p], here, '')
  local evicted_to = call('HGET', KEYS[p], 'evicted_to') or '0-0'
  stale[p] = id_above(evicted_to, watermarks[p]) and 'STALE ' .. evicted_to
  prefixes[p] = string.sub(KEYS[p], 1, -5) .. 'i:'
end
for n = 1, #items do
  local p, item = places[n], items[n]
  item[1] = prefixes[p] .. item[1]
  if refused[p] then
    lines[n] = refused[p]
  elseif call('EXISTS', item[1]) == 1 then
    lines[n] = 'EXISTS'
  elseif stale[p] then
    lines[n] = stale[p]
  else
    call('HSET', unpack(item))
    lines[n] = 'OK'
  end
end
return table.concat(lines, '\n')
