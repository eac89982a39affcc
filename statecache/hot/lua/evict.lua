-- Drops the hot copies of instances that SQL holds completely. Nothing else drops a hash, but a recovery (drop.lua).
--
-- KEYS   the meta of each partition touched. Instance keys are built from its prefix and lie in the same slot.
-- ARGV 1 items, a JSON array of [partition index, "machine:id", version of the checkpoint, watermark as read from SQL in
--        the same snapshot, unpark: 1 = drop a parked hash, whatever its version, because SQL holds no open letter of it]
--
-- Reply  one string, a line per item:
--   OK                              dropped; cold and evicted_to are set in the same step
--   GONE                            not hot: nothing to do
--   KEPT                            it moved on, is not flushed or is parked: nothing written
--   EPOCH | RECOVERING | IDENTITY   not admitted: nothing written
-- Cost   about 4 us an item: HGET, UNLINK.
--@include identity
--@include ids
--@include ready_or_fenced
local items, here, refused, evicted, prefixes = cjson.decode(ARGV[1]), identity(), {}, {}, {}
for p = 1, #KEYS do
  refused[p] = refusal(KEYS[p], here, '')
  evicted[p] = redis.call('HGET', KEYS[p], 'evicted_to') or '0-0'
  prefixes[p] = string.sub(KEYS[p], 1, -5) .. 'i:'
end
local lines = {}
for n = 1, #items do
  local p, name, version, watermark, unpark = unpack(items[n])
  local key = prefixes[p] .. name
  local own = not refused[p] and redis.call('HGET', key, '@')
  if refused[p] then
    lines[n] = refused[p]
  elseif not own then
    lines[n] = 'GONE'
  else
    local hot_version, entry_id, flags = string.match(own, '^%S+ (%d+) (%S+) %d+ %d+ %d+ ?(.*)$')
    local droppable = tonumber(hot_version) == version
    if flags == 'p' then droppable = unpark == 1 end
    if not droppable or id_above(entry_id, watermark) then
      lines[n] = 'KEPT'
    else
      if id_above(entry_id, evicted[p]) then evicted[p] = entry_id end
      redis.call('HSET', KEYS[p], 'cold', '1', 'evicted_to', evicted[p])
      redis.call('UNLINK', key)
      lines[n] = 'OK'
    end
  end
end
return table.concat(lines, '\n')
