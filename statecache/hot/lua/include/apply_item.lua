-- Applies the items from values[behind] on. The code is a loop's body, because the values that a function finds outside of itself
-- cost a call of a single item as much as its XADD; and a long one, because handing a dozen values to a function costs an
-- item as much as forty of its own instructions. What ends an item breaks out of the inner loop, which runs once.
local next_id, colds, next_versions, rare = EPOCH .. '-*', {}, several and {}, nil
while behind < last do
  local line
  repeat
    local p, id, move, token, tail = values[behind], values[behind + 1], moves[values[behind + 2]], values[behind + 3], values[behind + 4]
    local shape, first, expected, extras = values[behind + 5], behind + 6, 0, false
    if shape < 0 then shape, first, expected, extras = -shape, behind + 8, values[behind + 6], values[behind + 7] end
    local fields = sizes[shape]
    behind = first + fields
    if refused[p] then line = refused[p] break end
    local key = prefixes[p] .. move[1] .. id
    local own = pcall_('HMGET', key, '@', '@r')
    if own.err then line = 'TYPE' break end
    local now, ring, flags, wide, claimed, is_start = own[1], own[2], '', false, false, values[move[8]] == ''
    local from, version, created, words
    if not now then
      colds[p] = colds[p] or call('HMGET', metas[p], 'cold', 'evicted_to')
      local cold, evicted_to, absent = colds[p][1] or '1', colds[p][2] or '0-0', extras and extras[2] or ''
      if cold ~= '0' and absent ~= '' then rare = rare or rarely(metas, rooms, prefixes, at, fields_max) end
      if not is_start or (cold ~= '0' and (absent == '' or rare.id_above(evicted_to, absent))) then
        line = 'MISS ' .. cold .. ' ' .. evicted_to break
      end
      if rooms[p] <= 0 then
        rare = rare or rarely(metas, rooms, prefixes, at, fields_max)
        if not rare.has_room(p) then line = 'FULL' break end
      end
      if fields > fields_max then line = 'DATA fields ' .. fields break end
      from, version, created, ring, wide = '', '0', at, token, fields > NARROW_MAX
    else
      from, version, created, flags = match(now, '^(%S+) (%d+) %S+ (%d+) %d+ %d+(.*)$')
      if not from or not ring then line = 'TYPE' break end
      local place = find(ring, token, 1, true) -- at multiples of 8 only
      while place and place % 8 ~= 1 do place = find(ring, token, place + 1, true) end
      if place then
        call('HSET', key, '@r', ring) -- a WAIT after this call speaks of this write
        local back = (#ring - place - 7) / 8
        line = 'DUP ' .. (version - back) .. ' ' .. (back == 0 and match(now, '^%S+ %d+ (%S+)') or '-') break
      end
      if extras and extras[1] >= 0 and version - #ring / 8 > extras[1] then
        call('HSET', key, '@r', ring) -- it may prove a duplicate: a WAIT after this call speaks of it too
        line = 'OLD ' .. version break
      end
      if is_start then line = 'EXISTS ' .. version break end
      local claim = extras and extras[5] or ''
      if flags ~= '' or claim ~= '' then
        if find(flags, 'p', 1, true) then line = 'PARKED' break end
        claimed, wide = find(flags, 'c', 1, true), find(flags, 'w', 1, true)
        rare = rare or rarely(metas, rooms, prefixes, at, fields_max)
        line, flags = rare.kept_out(key, flags, claim)
        if line then break end
      end
      -- Before the checks of version and state: what follows an item that found no room must not be judged without it.
      if rooms[p] <= 0 then
        rare = rare or rarely(metas, rooms, prefixes, at, fields_max)
        if not rare.has_room(p) then line = 'FULL' break end
      end
      if expected ~= 0 and expected ~= version + 0 then line = 'VERSION ' .. version break end
    end
    words = several and move[5][from]
    if not words then
      local pair, pairs_end = move[8], move[9]
      while pair <= pairs_end and values[pair] ~= from do pair = pair + 2 end
      if pair > pairs_end then line = 'STATE ' .. from .. ' ' .. version break end
      local to = values[pair + 1]
      words = {
        '\31' .. move[6] .. '\31' .. from .. '\31' .. to .. '\31' .. at .. '\31',
        to .. ' ',
        ' ' .. (from == '' and '-' or from) .. ' ' .. to,
        to,
      }
      if several then move[5][from] = words end
    end

    local set, set_last, ending = arguments[shape], 6, move[3]
    for n = first, behind - 1 do
      set[set_last] = values[n]
      set_last = set_last + 2
    end
    set_last = set_last - 2
    if now then
      if extras and #extras[4] > 0 then
        rare = rare or rarely(metas, rooms, prefixes, at, fields_max)
        local results, text = rare.incremented(key, extras[4])
        if not results then line = 'DATA ' .. text break end
        set, ending, fields = { unpack(set, 1, set_last) }, '\31' .. text .. sub(ending, 2), fields + #results / 2
        for n = 1, #results do set[set_last + n] = results[n] end
        set_last = set_last + #results
      end
      if fields > 0 and (wide or NARROW_MAX + fields > fields_max) then
        local count = call('HLEN', key) - (claimed and 3 or 2) + fields
        rare = rare or rarely(metas, rooms, prefixes, at, fields_max)
        local rule = count > fields_max and rare.too_many(key, count, set, set_last, extras and extras[3])
        if rule then line = 'DATA ' .. rule break end
      end
      ring = #ring == 64 and sub(ring, 9) .. token or ring .. token
    end

    -- From here on nothing may fail: everything was checked, and a script that may run out of memory was refused at its start.
    -- But XADD, if a stranger's record has a higher id: it comes first.
    -- Numbers become text once: each time costs a third of a microsecond. A version has fewer than 14 digits, so `..` may do it,
    -- twice as fast as `%.0f`.
    local next_version = several and next_versions[version] or (version + 1) .. ''
    if several then next_versions[version] = next_version end
    version = next_version
    local entry_id = call('XADD', logs[p], next_id, 'e', move[2] .. id .. '\31' .. version .. words[1] .. tail .. ending)
    local mark = flags == '' and ' w' or 'w'
    set[2] = words[2] .. version .. ' ' .. entry_id .. ' ' .. created .. move[4] .. flags .. (wide and mark or '')
    set[4] = ring
    local new = call('HSET', key, unpack(set, 1, set_last))
    if claimed and flags == '' then call('HDEL', key, '@c') end
    if extras and #extras[3] > 0 then call('HDEL', key, unpack(extras[3])) end
    if move[7] then
      rare = rare or rarely(metas, rooms, prefixes, at, fields_max)
      rare.note_deadline(p, move[1] .. id, move[7], from, words[4])
    end
    if new > 0 and now and not wide and call('HLEN', key) - (flags == '' and 2 or 3) > NARROW_MAX then
      call('HSET', key, '@', set[2] .. mark)
    end
    rooms[p] = rooms[p] - 1
    line = 'OK ' .. version .. ' ' .. entry_id .. words[3]
  until true
  count = count + 1
  lines[count] = line
end
